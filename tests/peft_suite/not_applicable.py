"""PEFT's tests that cannot hold for us: name of the test -> why. Everything else must pass."""

IN_PLACE = (
    "asserts that the base weight never changes, or is the base's own while an adapter is live; an "
    "in-place method trains the weight itself. Ours instead: off-mask bits (tests/test_adapter.py)"
)
NO_WRAPPER = "asks the adapted module for a tuner layer's attributes; no module is replaced here"
BIAS = "bias= is refused: biases are parameters like others, named in the mask or in include="
FSDP1 = (
    "FSDP 1 replaces parameters by views of one flat tensor, and is refused; torch has deprecated "
    "it for FSDP 2"
)
AUTOCAST = (
    "autocast_adapter_dtype=False asks for values in the base's dtype, where small updates are "
    'lost; values_dtype="bfloat16" with SubnetAdamW(master="residual") is the way to that'
)
LAYERS = "layers_to_transform= is refused: layers are named in the mask or in include="

NOT_APPLICABLE = {
    "test_only_params_are_updated": IN_PLACE,
    "test_parameters_after_loading_model": IN_PLACE,
    "test_get_base_model_state_dict": IN_PLACE,
    "test_adapter_dtype_autocast[*-False-*": AUTOCAST,
    "test_add_adapter_no_autocast_adapter_dtype": AUTOCAST,
    "test_prepare_for_training_parametrized": (
        "asserts that enable_input_require_grads makes embeddings' outputs require gradients; here "
        "it does where reentrant checkpointing asks for it, so that backward ends at the first "
        "masked layer. Ours instead: tests/test_early_stop.py"
    ),
    "test_training_decoders_layer_indexing": LAYERS,
    "test_training_encoder_decoders_layer_indexing": LAYERS,
    "test_training_layer_indexing": LAYERS,
    "test_load_model_low_cpu_mem_usage": (
        "asserts that injecting leaves adapter parameters on the meta device; values are the "
        "base's own entries, read and not drawn, and exist at once"
    ),
    "test_set_adapter_non_overlapping_modules": NO_WRAPPER,
    "test_set_adapter_non_overlapping_modules_to_save": NO_WRAPPER,
    "test_set_requires_grad": NO_WRAPPER,
    "test_adding_multiple_adapters_with_bias_raises": BIAS,
    "test_save_load_roundtrip_fsdp_wrapped": FSDP1,
    "test_save_load_roundtrip_fsdp_wrapped_learnable_bias": BIAS,
}
