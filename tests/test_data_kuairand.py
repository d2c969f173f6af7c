"""KuaiRand: logs by date and part, actions as bits, features of users and videos."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest
from test_data_recipes import sequences, store_of

from npu_rec.data.sources import matching
from npu_rec.errors import DataError

T = 1649387651
LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)


def row(user: int, video: int, second: float, flags: str = "00000000", rand: int = 0) -> str:
    """A line of a log; flags are click, like, follow, comment, forward, hate, long view, profile enter."""
    *seven, profile = flags
    time = int(1000 * (T + second))
    return f"{user},{video},20220408,1100,{time},{','.join(seven)},6200,9000,0,0,{profile},{rand},1\n"


FILES = {
    # The later file holds an earlier event of user 3; videos 4 and 9 share a second in user 0.
    "log_standard_4_08_to_4_21_{}.csv": LOG + row(3, 5, 20, "10000010") + row(0, 4, 1) + row(0, 9, 1.9, "01000000"),
    "log_standard_4_22_to_5_08_{}.csv": LOG + row(3, 0, 10, "11111111") + row(0, 7, 50, "00100001"),
    "log_random_4_22_to_5_08_{}.csv": LOG + row(0, 8, 49, "00011100", rand=1),
    "user_features_{}.csv": "user_id,user_active_degree,follow_user_num_range,onehot_feat4\n"
    '0,full_active,"(0,10]",\n1,UNKNOWN,0,3\n3,high_active,500+,2\n',
    "video_features_basic_{}.csv": "video_id,author_id,video_type,tag\n"
    '0,18,NORMAL,"8,21"\n4,2,AD,\n5,7,NORMAL,3\n7,1,NORMAL,1\n9,1,NORMAL,1\n12,1,NORMAL,1\n',
}
SEQUENCES = {
    0: [(5, T + 1, 0), (10, T + 1, 2), (8, T + 50, 4 + 128)],
    3: [(1, T + 10, 255), (6, T + 20, 1 + 64)],
}


def write_files(folder: Path, version: str = "1k", files: dict[str, str] = FILES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.format(version)).write_text(text)
    return folder


@pytest.mark.parametrize("form", ["pure", "1k", "data", "zip", "parts"])
def test_kuairand(tmp_path: Path, form: str) -> None:
    source = write_files(tmp_path / "in" / ("data" if form == "data" else ""), "pure" if form == "pure" else "1k")
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "KuaiRand-1K.zip", "w") as archive:
            for path in source.iterdir():
                archive.write(path, f"KuaiRand-1K/data/{path.name}")
        source = tmp_path / "KuaiRand-1K.zip"
    elif form == "data":
        source = source.parent
    elif form == "parts":
        for path in list(source.iterdir()):
            path.rename(source / path.name.replace("1k", "27k" if "features" in path.name else "27k_part1"))
        (source / "log_standard_4_08_to_4_21_27k_part2.csv").write_text(LOG + row(2, 0, 3) + row(0, 5, 1.5))
    store = store_of("kuairand", source, tmp_path)
    parts = {0: [*SEQUENCES[0][:2], (6, T + 1, 0), SEQUENCES[0][2]], 2: [(1, T + 3, 0)]}  # ties: files in order
    assert sequences(store) == (SEQUENCES | parts if form == "parts" else SEQUENCES)
    assert store.items["item_id"].to_pylist() == [1, 5, 6, 8, 10, 13]
    assert store.items["raw_id"].to_pylist() == ["0", "4", "5", "7", "9", "12"]
    assert store.items["tag"].to_pylist() == ["8,21", None, "3", "1", "1", "1"]
    assert store.catalogue("seen").tolist() == [1, 5, 6, 8, 10]
    assert store.user_features is not None
    features = {feature["user"]: feature for feature in store.user_features.to_pylist()}
    assert features[0] == {
        "user": 0, "user_active_degree": "full_active", "follow_user_num_range": "(0,10]", "onehot_feat4": None
    }  # fmt: skip
    assert "is_profile_enter 128" in store.manifest["actions"]


def test_random_exposures_are_an_option(tmp_path: Path) -> None:
    lines: list[str] = []
    source = write_files(tmp_path / "in")
    store = store_of("kuairand", source, tmp_path, lines.append, options={"random": True})
    assert sequences(store)[0] == [*SEQUENCES[0][:2], (9, T + 49, 8 + 16 + 32), SEQUENCES[0][2]]
    assert "video_features_basic_1k.csv: 1 videos of the logs are not listed there" in lines
    assert dict(zip(store.items["raw_id"].to_pylist(), store.items["video_type"].to_pylist(), strict=True))["8"] is None


def test_features_may_be_missing(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", files={name: text for name, text in FILES.items() if "log_s" in name})
    store = store_of("kuairand", source, tmp_path)
    assert sequences(store) == SEQUENCES
    assert store.user_features is None
    assert store.items["raw_id"].to_pylist() == ["0", "4", "5", "7", "9"]
    with pytest.raises(DataError, match=r"no log_random_\*.csv there"):
        store_of("kuairand", source, tmp_path, options={"random": True})
    one = store_of("kuairand", source / "log_standard_4_22_to_5_08_1k.csv", tmp_path)
    assert sequences(one) == {0: SEQUENCES[0][2:], 3: SEQUENCES[3][:1]}
    (source / "log_standard_4_08_to_4_21_1k.csv").write_text(LOG)
    assert sequences(store_of("kuairand", source, tmp_path)) == sequences(one)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "log_standard_4_22_to_5_08_1k.csv",
            LOG + row(0, 1, 1, "00200000"),
            "row 2, column is_follow: '2' is not one of",
        ),
        ("log_standard_4_22_to_5_08_1k.csv", LOG + row(0, -1, 1), "row 2, column video_id: '-1' is a negative id"),
        ("log_standard_4_22_to_5_08_1k.csv", LOG.replace("time_ms,is", "time,is"), "no column 'time_ms'"),
        ("log_standard_4_08_to_4_21_1k.csv", LOG + row(0, 1, 1)[:-3], "row 2: 18 fields, expected 19"),
        ("user_features_1k.csv", "user_id,a\n1,2\n1,3\n", "row 3, column user: 1 is listed a second time"),
        ("video_features_basic_1k.csv", "video_id,a\n0,2\n0,3\n", "row 3, column item: 0 is listed a second time"),
    ],
)
def test_malformed_files(tmp_path: Path, file: str, text: str, expected: str) -> None:
    source = write_files(tmp_path / "in")
    (source / file).write_text(text)
    with pytest.raises(DataError) as caught:
        store_of("kuairand", source, tmp_path)
    assert expected in str(caught.value)


def test_missing_and_mixed_logs(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in")
    write_files(source, "pure")
    with pytest.raises(DataError, match="logs of several versions, _1k, _pure; keep them apart"):
        store_of("kuairand", source, tmp_path)
    with pytest.raises(DataError, match=r"no log_standard_\*.csv there \(events are in it\)"):
        store_of("kuairand", tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"not downloaded \(KuaiRand-Pure, -1K or -27K: kuairand.com\)"):
        store_of("kuairand", None, tmp_path)


def test_a_log_is_read_once_packed_and_unpacked(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in")
    for path in list(source.glob("log_*.csv")):
        (source / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [path.suffix for path in matching(source, "log_standard_*.csv")] == [".csv", ".csv"]
    assert sequences(store_of("kuairand", source, tmp_path)) == SEQUENCES
