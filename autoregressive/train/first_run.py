"""Settings of the GPT trainer to begin with, for so many images on such a machine; extraction prints them."""

from utils.distributed import World

STEPS_PER_EPOCH = 20  # at least, for the order of the images to matter
STEPS_ON_CPU = 3_000  # of GPT-Tiny on 8x8 codes: minutes


def first_settings(images: int, grid: tuple[int, int], world: World) -> dict[str, str | float | bool]:
    """The published recipe where there is a GPU, else one that ends within minutes; smaller batches of few images."""
    on_gpu = world.device.type == "cuda"
    batch = 256 if on_gpu else 32
    while batch > 1 and batch * STEPS_PER_EPOCH > images:
        batch //= 2
    batch = -(-batch // world.size) * world.size
    chosen = {"scheduler": True, "ema": True, "global_batch_size": batch}
    if grid[0] % 2:
        chosen["patch_level"] = 1
    if on_gpu:
        return {"gpt_model": "GPT-B", "epochs": 300} | chosen
    epochs = 2 * round(STEPS_ON_CPU / 2 / max(1, images // batch))
    small = {"gpt_model": "GPT-Tiny", "epochs": min(60, max(4, epochs))}
    return small | chosen | {"lr": 2e-3, "end_lr": 1e-4, "mixed_precision": "none"}
