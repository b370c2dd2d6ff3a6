"""ADE20K-847: images and label maps of 847 classes from the validation images of the full ADE20K (2021_17_01).

The download has several thousand classes; papers on open vocabularies evaluate the 847 most frequent ones, on images
whose short side is reduced to 512 pixels. The folders have the names that other projects use, so that those made by
them are read as well. Images are resized like labels, at pixel centers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spar_lightning.evaluation.benchmark_config import BenchmarkError
from spar_lightning.files.atomic import new_folder

SHORT_SIDE: Final = 512  # px, if both sides are longer
VOID: Final = 65535
# Number of each class in the download, in the order of the classes.
# fmt: off
IDS: Final = (
    2978, 312, 2420, 2855, 2131, 976, 447, 165, 2377, 838, 350, 1831, 1125, 3055, 401, 1610, 1910, 2684, 471, 687,
    774, 2473, 2264, 1735, 2994, 1564, 1276, 2178, 2329, 57, 907, 913, 1395, 2138, 2272, 2128, 724, 155, 2053, 2380,
    689, 1788, 3087, 2530, 581, 2388, 2985, 2454, 2096, 137, 294, 212, 2185, 524, 2212, 943, 1869, 2251, 2793, 2423,
    1121, 266, 1948, 1744, 783, 571, 627, 629, 491, 1374, 223, 3016, 2598, 978, 239, 608, 236, 2531, 2616, 591, 327,
    2679, 1451, 181, 420, 2821, 1023, 855, 2733, 2928, 1240, 77, 1969, 2880, 14, 1936, 2828, 631, 103, 3144, 308,
    1282, 38, 1563, 29, 480, 2569, 247, 187, 778, 2243, 1941, 2833, 120, 95, 2836, 1087, 868, 1401, 220, 47, 843,
    123, 2537, 1927, 2337, 1702, 64, 249, 642, 1981, 609, 2840, 2586, 1393, 2704, 1304, 146, 1494, 2739, 389, 1551,
    131, 738, 161, 747, 1919, 3109, 2179, 2989, 206, 1930, 1002, 2254, 1708, 2526, 160, 2901, 2262, 44, 597, 2235,
    1260, 682, 2151, 3107, 432, 1098, 2932, 461, 410, 2046, 533, 1481, 1858, 894, 1322, 1891, 1756, 49, 1272, 1229,
    2850, 1784, 2962, 259, 319, 954, 1974, 1013, 2356, 97, 318, 592, 2885, 1017, 851, 1407, 1332, 303, 2714, 1924,
    1346, 1081, 1583, 2727, 2509, 2123, 602, 202, 10, 490, 530, 2213, 1884, 2934, 2687, 387, 2668, 982, 2547, 1474,
    877, 1391, 414, 698, 2019, 2422, 3010, 1139, 753, 1747, 2175, 1301, 1033, 1789, 2939, 2730, 1652, 90, 1349,
    2830, 1485, 2370, 2155, 118, 1402, 1957, 3130, 1197, 52, 2688, 96, 762, 772, 1857, 2315, 1016, 643, 3105, 1849,
    791, 349, 6, 3114, 1587, 1233, 559, 1223, 3049, 1943, 853, 709, 1390, 2748, 2007, 1546, 1513, 2600, 2538, 1790,
    194, 326, 2877, 594, 2036, 1662, 2366, 1754, 418, 2553, 1951, 1963, 918, 2086, 997, 2731, 704, 1365, 569, 3108,
    948, 839, 63, 1305, 378, 2362, 2734, 2982, 2398, 1119, 382, 1141, 1805, 3102, 2341, 1131, 2316, 2626, 3104, 198,
    1896, 2800, 190, 3131, 1463, 357, 929, 209, 912, 1164, 1509, 2539, 3116, 2615, 1644, 818, 242, 2217, 2347, 2686,
    2300, 572, 789, 358, 2443, 101, 2969, 2692, 606, 2339, 1533, 2060, 1782, 495, 371, 2707, 889, 3156, 2683, 1499,
    1135, 1619, 125, 2838, 2792, 1695, 746, 1343, 1370, 2858, 145, 2565, 1892, 1103, 286, 170, 3073, 922, 1655,
    1602, 2160, 1151, 2176, 2239, 132, 394, 1424, 607, 700, 116, 1425, 2676, 141, 2360, 2449, 897, 317, 2228, 2351,
    1543, 656, 1088, 373, 2472, 2892, 1740, 3067, 1367, 188, 79, 1633, 1885, 677, 1779, 1297, 2334, 3027, 2735,
    1791, 2405, 1748, 2983, 3035, 2824, 2168, 385, 2148, 2465, 175, 390, 268, 2722, 2857, 3088, 2926, 2782, 1378,
    1934, 2072, 2889, 944, 1158, 1383, 867, 2145, 1915, 361, 402, 482, 2761, 300, 1554, 636, 260, 1186, 871, 2859,
    2103, 208, 2236, 2012, 2462, 1462, 2832, 2617, 1024, 1129, 18, 376, 134, 407, 434, 2017, 2717, 2005, 2993, 1545,
    1445, 2831, 1161, 2411, 2949, 1769, 552, 2327, 939, 3013, 1986, 1486, 2723, 1549, 2649, 1020, 392, 422, 1419,
    2099, 2464, 3058, 430, 675, 2941, 2955, 2355, 840, 32, 2338, 1232, 2834, 2991, 2879, 444, 1657, 2246, 296, 245,
    2661, 1202, 1714, 251, 1095, 1828, 311, 2732, 947, 2115, 2738, 2525, 2194, 634, 740, 2682, 2020, 1156, 1036,
    1295, 1181, 3037, 1614, 736, 893, 2047, 1274, 1361, 3036, 2606, 2797, 2022, 2876, 2758, 472, 3028, 882, 1189,
    743, 3122, 2401, 468, 1061, 1523, 3059, 2843, 2853, 1529, 214, 3032, 3071, 277, 813, 426, 1039, 727, 1508, 2490,
    2299, 768, 1172, 537, 1847, 1664, 1110, 1014, 662, 121, 227, 2410, 2165, 2696, 3005, 1231, 635, 292, 2690, 65,
    2607, 2574, 1188, 456, 2913, 459, 1955, 827, 1111, 2412, 2997, 528, 366, 1863, 500, 1001, 1958, 1441, 809, 210,
    435, 718, 1674, 388, 1572, 1584, 1944, 674, 99, 2352, 1019, 1763, 185, 554, 1066, 2508, 951, 2822, 415, 297,
    1914, 2619, 1338, 2505, 955, 2786, 238, 3000, 2763, 299, 822, 1288, 3101, 2894, 992, 489, 2157, 2309, 1576,
    1810, 2964, 2662, 2087, 1569, 503, 1505, 1468, 1613, 1138, 1256, 2715, 2846, 477, 2576, 108, 2245, 1162, 2149,
    2183, 858, 1324, 1055, 1741, 149, 615, 825, 2143, 304, 283, 2322, 3017, 2510, 1960, 265, 2282, 2184, 1461, 3113,
    2372, 2166, 232, 693, 1945, 3039, 2494, 1908, 2827, 280, 2950, 1044, 288, 2863, 1342, 2409, 1258, 2249, 2862,
    920, 1607, 2802, 610, 3129, 1108, 2823, 476, 2641, 2788, 2070, 1368, 2903, 699, 2844, 942, 2663, 457, 2701,
    2540, 2231, 2746, 1738, 2350, 2808, 2025, 2541, 2156, 126, 2512, 831, 2503, 2039, 2774, 886, 919, 2240, 2636,
    963, 1218, 1406, 1420, 526, 2639, 975, 1921, 2305, 1193, 2517, 2809, 1647, 314, 2560, 545, 1345, 775, 603, 1163,
    1641, 1678, 2450, 2915, 42, 2242, 2741, 1143, 862, 1654, 1826, 1689, 3124, 2710, 152, 549, 360, 1982, 1478,
    2203, 2612, 2956, 2681, 437, 2171, 1933, 3110, 1824, 2803, 234, 764, 177, 817, 3145, 1262, 864, 2359, 2992,
    1725, 2667, 2484, 1133, 1667, 2847, 932, 1392, 2573, 2140, 1046, 264, 2927, 2752, 679, 2493, 1658, 2466, 1057,
    2444, 2093, 2248, 2432, 726, 816, 1171, 2766, 2900, 2313, 488, 2265, 2043, 332, 1771, 2320, 2646, 1089, 2826,
    3148,
)
# fmt: on
IMAGES: Final = "images_detectron2/validation"
LABELS: Final = "annotations_detectron2/validation"


def convert(folder: Path) -> Iterator[str]:
    """Write images and label maps of all validation images; yield the image names.

    Args:
        folder: Folder of the download, with images/ADE/validation/.

    Raises:
        BenchmarkError: If a file is missing or damaged, or if a folder to write already exists.
    """
    paths = sorted((folder / "images" / "ADE" / "validation").rglob("ADE_val_*.jpg"))
    if not paths:
        raise BenchmarkError(
            f"{folder / 'images/ADE/validation'} contains no ADE_val_*.jpg. Unpack the full ADE20K (2021_17_01) and "
            "set --root to the folder above ADE20K_2021_17_01."
        )
    for out in (folder / IMAGES, folder / LABELS):
        if out.exists():
            raise BenchmarkError(f"{out} already exists. To create it again, delete it first.")
    with new_folder(folder / IMAGES) as images, new_folder(folder / LABELS) as labels:
        for path in paths:
            image, values = read_pair(path)
            image.save(images / path.name, quality=95, subsampling=0)
            Image.fromarray(values).save(labels / f"{path.stem}.tif", compression="tiff_deflate")
            yield path.stem


def read_pair(path: Path) -> tuple[Image.Image, NDArray[np.uint16]]:
    """Return an image and its class ids (H, W), 65535 for other classes, with a short side of at most 512 pixels.

    Raises:
        BenchmarkError: If a file is missing or damaged.
    """
    try:
        with Image.open(path) as file, Image.open(path.with_name(f"{path.stem}_seg.png")) as segments:
            image, colors = file.convert("RGB"), np.asarray(segments.convert("RGB"))
    except Exception as error:  # Pillow raises different exception types for each format
        raise BenchmarkError(f"{path} or its _seg.png cannot be read: {error}. Unpack the download again.") from error
    if colors.shape[:2] != image.size[::-1]:
        raise BenchmarkError(f"{path} and its _seg.png have different sizes. Unpack the download again.")
    values = class_ids(colors)
    if min(image.size) > SHORT_SIDE:
        width, height = (round(side / min(image.size) * SHORT_SIDE) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        values = np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))
    return image, values


def class_ids(colors: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Convert colors of a `_seg.png` (H, W, 3) to class ids: the number of a class is 256 * (red // 10) + green."""
    numbers = colors[..., 0].astype(int) // 10 * 256 + colors[..., 1]
    table = np.full(26 * 256, VOID, np.uint16)
    table[list(IDS)] = np.arange(len(IDS))
    return np.asarray(table[numbers])
