"""Adds SUBNET_FT to PEFT's registries."""

from peft.utils import PeftType

TYPE = "SUBNET_FT"


def register() -> PeftType:
    """Add our member to the ``PeftType`` enum, which ``register_peft_method`` does not extend.

    The config and model classes are added by `subnet_ft.adapter.model` when it is imported.

    Returns:
        The enum member ``PeftType.SUBNET_FT``.
    """
    if TYPE in PeftType.__members__:
        return PeftType[TYPE]
    member = str.__new__(PeftType, TYPE)
    member._name_ = member._value_ = TYPE
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, TYPE, member)  # an enum refuses new attributes the ordinary way
    PeftType._member_names_.append(TYPE)
    PeftType._member_map_[TYPE] = member
    PeftType._value2member_map_[TYPE] = member
    return member
