"""The PEFT adapter: config, layer and model in PEFT's own shape; importing it registers them."""

from subnet_ft.adapter.registration import register  # isort: skip

register_type = register()  # SubnetConfig names the type when its class is made

from subnet_ft.adapter.config import SubnetConfig  # noqa: E402
from subnet_ft.adapter.layer import SubnetLayer  # noqa: E402
from subnet_ft.adapter.model import SubnetModel  # noqa: E402

__all__ = ["SubnetConfig", "SubnetLayer", "SubnetModel"]
