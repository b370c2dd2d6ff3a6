"""Format of the label maps of a benchmark: where they are, and the meaning of their values or colors."""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class LabelFiles:
    """Format of label maps: images with one channel, palette images (their indices are the values), or colors.

    Attributes:
        file: Pattern of the label map paths.
        reduce_zero_label: If true, the value 0 is ignored and the value k means class k - 1.
        label_map: Class id of each value in the file; null if the values are the class ids.
        ignored: Values of pixels that are not counted; null means 255, unless it is a class.
        colors: For RGB images: the color [red, green, blue] of each class, in the order of the class ids.
        ignored_colors: Colors of pixels that are not counted.
    """

    file: str
    reduce_zero_label: bool = False
    label_map: dict[int, int] | None = None
    ignored: list[int] | None = None
    colors: list[tuple[int, int, int]] | None = None
    ignored_colors: list[tuple[int, int, int]] = field(default_factory=list)

    def resolved(self, classes: int) -> "LabelFiles":
        """Return the format with a list of ignored values, for a number of classes.

        Raises:
            ValueError: If a value is both ignored and a class, or if there is not one color for each class.
        """
        if self.colors is None and self.ignored_colors:
            raise ValueError(f"{self.file}: ignored_colors needs colors. Add the color of each class")
        if self.colors is not None:
            if self.reduce_zero_label or self.label_map is not None or self.ignored:
                raise ValueError(f"{self.file}: colors replaces reduce_zero_label, label_map and ignored. Remove them")
            every = [*self.colors, *self.ignored_colors]
            if wrong := [color for color in every if not all(0 <= part <= 255 for part in color)]:
                raise ValueError(f"{self.file}: {list(wrong[0])} is not a color. Each part must be from 0 to 255")
            if twice := [color for color, count in Counter(every).items() if count > 1]:
                raise ValueError(f"{self.file}: the color {list(twice[0])} occurs twice. Remove one of the two")
            if len(self.colors) != classes:
                raise ValueError(f"{self.file}: {len(self.colors)} colors for {classes} classes. Each class needs one")
            return replace(self, ignored=[])
        named = range(self.reduce_zero_label, classes + self.reduce_zero_label)
        values = set(named if self.label_map is None else self.label_map)
        if self.ignored is None:
            return replace(self, ignored=[255] if 255 not in values else [])
        if both := sorted(values & {*self.ignored}):
            key = "a class" if self.label_map is None else "a class in label_map"
            raise ValueError(f"{self.file}: the value {both[0]} is {key}, but also in ignored. Remove one of the two")
        return self

    def protocol(self) -> dict[str, Any]:
        """Return the settings; those for colors only if they are used."""
        used = asdict(self)
        return used if self.colors else {name: used[name] for name in used if not name.endswith("colors")}
