"""What `--recipe` takes besides the script's own: systems that this project replaces, as their READMEs describe them.

Where a README is silent, a choice that lands near its figures, marked "chosen".
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    # Reference 002: a beginner's CNN, Adam at 0.001, batches of 32, 10 epochs, random crops and flips.
    "beginner": {
        "model": "beginner-cnn", "epochs": 10, "batch_size": 32, "optimizer": "adam", "lr": 1e-3, "scheduler": "none",
        "label_smoothing": 0.0, "augment": "flip,crop=4", "precision": "fp32",
    },
    # Reference 000: coursework that ends at 35 % after 10 epochs; all but the network and the epochs is chosen.
    "coursework": {
        "model": "coursework-cnn", "epochs": 10, "batch_size": 64, "optimizer": "sgd", "lr": 3e-4, "momentum": 0.0,
        "weight_decay": 0.0, "scheduler": "none", "label_smoothing": 0.0, "augment": "none", "precision": "fp32",
    },
    # KellerJordan/cifar10-airbench's 94 %: all images, tested on six views; batches half as large, which suits a CPU.
    "airbench94": {
        "model": "airbench94", "epochs": 8, "batch_size": 1000, "lr": 0.24, "val_fraction": 0.0, "test_views": 6,
        "low_res": 0.0,
    },
}  # fmt: skip
