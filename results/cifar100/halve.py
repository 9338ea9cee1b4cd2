"""A folder of images at half their size: a box filter, as PNG.

python results/cifar100/halve.py cifar100 cifar100-16
"""

from pathlib import Path

import click
from PIL import Image


@click.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def main(source: Path, target: Path) -> None:
    """Write the images of SOURCE at half their width and height to the same places in TARGET."""
    for path in sorted(source.glob("*/*/*")):
        to = (target / path.relative_to(source)).with_suffix(".png")
        to.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            size = image.width // 2, image.height // 2
            image.convert("RGB").resize(size, Image.Resampling.BOX).save(to)


if __name__ == "__main__":
    main()
