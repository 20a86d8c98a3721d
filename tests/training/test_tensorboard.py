"""TensorBoard's files, read back with TensorBoard's own reader."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from phase2_jax.training.event_files import truncate_after
from phase2_jax.training.heatmap_image import gamma_heatmap_image
from phase2_jax.training.logger_base import Logger
from phase2_jax.training.records import Record, batch_tags, epoch_tags
from phase2_jax.training.tensorboard import TensorBoardLogger

MakeRecord = Callable[[int], Record]
LogSteps = Callable[[Logger, int, int], None]


def read(logdir: Path) -> EventAccumulator:
    events = EventAccumulator(str(logdir), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0})
    return events.Reload()


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_has_every_tag_at_its_step(
    tmp_path: Path, step_record: MakeRecord, epoch_record: MakeRecord, log_steps: LogSteps
) -> None:
    logger = TensorBoardLogger(tmp_path, every=5)
    logger.on_start({"hyperparameters": {"model": {"d_model": 128}, "data": {"path": "a|b"}}})
    log_steps(logger, 1, 20)
    logger.close()
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == batch_tags(step_record(1)).keys() | epoch_tags(epoch_record(1)).keys()
    for tag, value in batch_tags(step_record(15)).items():
        assert [step for step, _ in points(events, tag)] == [1, 5, 10, 15, 20]
        assert points(events, tag)[3][1] == np.float32(value)
    for tag, value in epoch_tags(epoch_record(2)).items():
        assert [step for step, _ in points(events, tag)] == [10, 20]
        assert points(events, tag)[1][1] == np.float32(value)
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| model.d_model | 128 |" in text
    assert 'data.path | "a\\|b" |' in text


def test_tensorboard_histograms_and_heat_map_show_the_gammas(
    tmp_path: Path, epoch_record: MakeRecord, log_steps: LogSteps
) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.on_start({})
    log_steps(logger, 1, 20)
    logger.close()
    events = read(tmp_path)
    record = epoch_record(2)
    edges, counts = np.array(record["gamma_histogram"]["edges"]), record["gamma_histogram"]["counts"][1]
    filled = np.flatnonzero(counts)
    histogram = events.Histograms("gamma_histogram/layer_1")[1]
    value = histogram.histogram_value
    assert histogram.step == 20
    assert list(value.bucket) == counts[filled[0] : filled[-1] + 1]
    np.testing.assert_allclose(value.bucket_limit, edges[filled[0] + 1 : filled[-1] + 2])
    assert (value.min, value.max, value.num) == (edges[filled[0]], edges[filled[-1] + 1], sum(counts))
    # Bins are 78 % wide, so that their middles give the mean within 30 %.
    np.testing.assert_allclose(value.sum, np.sum(record["gamma_heatmap"][1]), rtol=0.3)
    image = events.Images("gamma_heatmap")[1]
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert image.step == 20
    np.testing.assert_array_equal(pixels, gamma_heatmap_image(np.array(record["gamma_heatmap"])))


def test_tensorboard_dashboard_opens_on_gamma(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.on_start({})
    logger.close()
    proto = read(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(proto.string_val[0])  # pyright: ignore[reportAttributeAccessIssue]
    assert [category.title for category in layout.category][:2] == ["Γ (forgetting rate)", "Loss and perplexity"]
    assert layout.category[0].chart[0].multiline.tag == [r"gamma/layer_\d+$"]
    series = layout.category[0].chart[1].margin.series[0]
    assert (series.value, series.lower, series.upper) == ("batch/gamma_mean", "batch/gamma_min", "batch/gamma_max")


def test_resume_leaves_no_doubled_and_no_orphan_points(tmp_path: Path, log_steps: LogSteps) -> None:
    killed = TensorBoardLogger(tmp_path, every=5)
    killed.on_start({})
    log_steps(killed, 1, 24)
    killed.close()
    # The last checkpoint was at step 12; the rest of the first session, its second epoch too, is done again.
    before = len(list(tmp_path.iterdir()))
    resumed = TensorBoardLogger(tmp_path, every=5)
    resumed.on_start({"start_step": 12})
    log_steps(resumed, 13, 18)
    resumed.close()
    assert len(list(tmp_path.iterdir())) == before + 1  # the second writer did not take the first one's file
    events = read(tmp_path)
    # TensorBoard's own server reads everything as tensors, and tells sessions apart by other rules.
    server = plugin_event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    for tag in ("batch/loss", "gamma/layer_0"):
        assert [event.step for event in events.Scalars(tag)] == [1, 5, 10, 15]
        assert [event.step for event in server.Tensors(tag)] == [1, 5, 10, 15]
    assert [event.step for event in events.Scalars("val/loss")] == [10]
    assert [event.step for event in events.Histograms("gamma_histogram/layer_0")] == [10]
    assert [event.step for event in events.Images("gamma_heatmap")] == [10]
    for tag in ("val/loss", "gamma_histogram/layer_0", "gamma_heatmap"):
        assert [event.step for event in server.Tensors(tag)] == [10]


def test_events_beyond_the_checkpoint_are_gone_from_the_files(tmp_path: Path, log_steps: LogSteps) -> None:
    killed = TensorBoardLogger(tmp_path, every=1)
    killed.on_start({})
    log_steps(killed, 1, 24)
    killed.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + b"half a record")
    truncate_after(tmp_path, 12)
    assert list(tmp_path.iterdir()) == [path]
    content = path.read_bytes()
    assert points(read(tmp_path), "batch/loss")[-1][0] == 12
    assert [step for step, _ in points(read(tmp_path), "val/loss")] == [10]
    truncate_after(tmp_path, 12)
    assert path.read_bytes() == content


def test_checkpoint_brings_the_curves_so_far_to_disk(tmp_path: Path, log_steps: LogSteps) -> None:
    logger = TensorBoardLogger(tmp_path, every=1)
    logger.on_start({})
    log_steps(logger, 1, 9)
    logger.on_checkpoint(9)
    # Read while the writer is open, as after a kill.
    assert [step for step, _ in points(read(tmp_path), "batch/loss")] == list(range(1, 10))
    logger.close()


def test_epoch_without_pictures_or_figures_is_logged(tmp_path: Path, epoch_record: MakeRecord) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.on_epoch(epoch_record(1), improved=True)  # before the start: nothing to write to
    logger.on_start({})
    empty = {"edges": [0.0, 1.0], "counts": [[0]]}
    logger.on_epoch({"epoch": 1, "step": 10, "val_loss": 2.0, "gamma_histogram": empty}, improved=True)
    logger.close()
    logger.close()
    events = read(tmp_path)
    assert points(events, "val/loss") == [(10, 2.0)]
    assert events.Tags()["histograms"] == []


def test_heat_map_colours_follow_the_rates() -> None:
    gamma = np.full((2, 8), 0.1)
    gamma[1] = 0.001
    gamma[1, 4:] = np.nan
    pixels = gamma_heatmap_image(gamma).astype(int)
    left, right = 70 + 64, 70 + 448  # inside the map: left half, right half
    assert tuple(pixels[40, left]) == (253, 231, 36)  # viridis' bright end
    assert tuple(pixels[280, left]) == (68, 1, 84)  # and its dark end
    assert tuple(pixels[280, right]) == (200, 200, 200)


@pytest.mark.parametrize("shape", [(1, 1), (4, 257), (24, 5000), (300, 16)])
def test_heat_map_has_a_sensible_size_for_any_model(shape: tuple[int, int]) -> None:
    height, width, channels = gamma_heatmap_image(np.zeros(shape)).shape
    assert 512 <= width <= 1300
    assert 256 <= height <= 1300
    assert channels == 3
