"""Pictures hold the pixels that went in, where they belong; sliders are sound HTML."""

import base64
import html.parser
import io
import json

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from minddpm import viz


def tiles(n, c=3, h=2, w=4):
    """n images (n, c, h, w) uint8, each pixel different from tile to tile."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 255, (n, c, h, w), generator=generator, dtype=torch.uint8)


# Grids


def test_grid_sets_tiles_row_by_row_and_leaves_the_rest_white():
    x = tiles(5)
    picture = viz.grid(x, columns=3)
    assert picture.dtype == np.uint8
    assert picture.shape == (2 * 2, 3 * 4, 3)
    for i in range(6):
        row, column = divmod(i, 3)
        tile = picture[2 * row : 2 * row + 2, 4 * column : 4 * column + 4]
        truth = x[i].permute(1, 2, 0).numpy() if i < 5 else np.full((2, 4, 3), 255)
        assert (tile == truth).all()


def test_grid_repeats_grey_in_all_three_channels():
    x = tiles(2, c=1)
    picture = viz.grid(x)
    assert picture.shape == (2, 8, 3)  # no more columns than images
    for channel in range(3):
        assert (picture[:, :4, channel] == x[0, 0].numpy()).all()
        assert (picture[:, 4:, channel] == x[1, 0].numpy()).all()


def test_grid_scales_by_repeating_pixels():
    small = viz.grid(tiles(4), columns=2)
    large = viz.grid(tiles(4), columns=2, scale=3)
    assert large.shape == (12, 24, 3)
    for dy in range(3):
        for dx in range(3):
            assert (large[dy::3, dx::3] == small).all()


def test_grid_reads_floats_as_minus_one_to_one():
    x = torch.tensor([-1.0, 0.2, 1, 3]).view(1, 1, 2, 2)
    assert viz.grid(x)[..., 0].tolist() == [[0, 153], [255, 255]]  # 1.2 * 127.5 = 153


def test_grid_leaves_its_input_alone():
    x = tiles(3)
    before = x.clone()
    viz.grid(x, columns=2, scale=2)[:] = 0
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 2, 4, 4), (0, 1, 4, 4), (1, 2, 3, 4, 4)])
def test_grid_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"expected images \(N, 1 or 3, H, W\) with N >= 1, got"):
        viz.grid(torch.zeros(shape))


def test_grid_refuses_other_values():
    with pytest.raises(ValueError, match="NaN or infinity"):
        viz.grid(torch.full((1, 1, 2, 2), torch.nan))
    with pytest.raises(TypeError, match=r"floating-point .*got torch.int64"):
        viz.grid(torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    for wrong in ({"columns": 0}, {"scale": 0}):
        with pytest.raises(ValueError, match="columns and scale must be 1 or more"):
            viz.grid(tiles(2), **wrong)


@pytest.mark.parametrize(("c", "mode"), [(1, "L"), (3, "RGB")])
def test_png_is_lossless_and_grey_where_it_can_be(c, mode):
    picture = viz.grid(tiles(3, c=c), columns=2)
    image = Image.open(io.BytesIO(viz.png(picture)))
    assert image.format == "PNG"
    assert image.mode == mode
    assert (np.asarray(image.convert("RGB")) == picture).all()


# Figures


@pytest.fixture
def clean():
    yield
    plt.close("all")


def test_style_changes_known_settings_and_nothing_else(clean):
    with mpl.rc_context():
        before = mpl.rcParams.copy()
        viz.style()
        after = mpl.rcParams.copy()
        assert not plt.get_fignums()
    changed = {name for name in after if after[name] != before[name]}
    assert {"axes.prop_cycle", "figure.figsize", "image.cmap"} <= changed
    assert after["axes.prop_cycle"].by_key()["color"][:3] == [viz.DATA, viz.NOISE, viz.MODEL]
    assert not [name for name in changed if name.startswith(("backend", "savefig", "interactive"))]


def test_show_draws_the_grid_without_axes(clean):
    ax = viz.show(tiles(5), columns=3, title="five")
    assert (np.asarray(ax.images[0].get_array()) == viz.grid(tiles(5), columns=3)).all()
    assert ax.get_title() == "five"
    assert not ax.axison
    own = plt.figure().gca()
    assert viz.show(tiles(1), ax=own) is own


def test_film_is_one_column_a_frame(clean):
    frames = torch.stack([tiles(2), 254 - tiles(2), tiles(2) // 2])
    figure = viz.film(frames, ["a", "b", "c"])
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c"]
    for ax, frame in zip(figure.axes, frames, strict=True):
        assert (np.asarray(ax.images[0].get_array()) == viz.grid(frame, columns=1)).all()
    with pytest.raises(ValueError, match="got 3 frames and 2 labels"):
        viz.film(frames, ["a", "b"])


def test_snapshot_holds_the_pixels_and_closes_the_figure(clean):
    figure = plt.figure(figsize=(3, 2), dpi=50, facecolor="#102030")
    pixels = viz.snapshot(figure)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 100, 150)
    assert (pixels == torch.tensor([0x10, 0x20, 0x30])[:, None, None]).all()
    assert not plt.fignum_exists(figure.number)


# Sliders


class Elements(html.parser.HTMLParser):
    """The elements of a piece of HTML, as (tag, attributes), and its text; checks the nesting."""

    EMPTY = ("img", "br", "input")

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.found, self.open, self.text = [], [], {}
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), "an attribute stands twice"
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        tag = self.open[-1]
        self.text[tag] = self.text.get(tag, "") + text

    def one(self, tag):
        (attributes,) = [a for t, a in self.found if t == tag]
        return attributes


NASTY = ["t = 0", 'a "quoted" <b>&amp;</b>', "|x| = 'one'", "50 %\n{next}"]


def slider(**options):
    plain = {"labels": NASTY, "alt": 'digits "fade" <to> noise & more', "name": "t"}
    return viz.Slider(tiles(4), **{**plain, **options})


def test_slider_is_one_picture_and_one_labelled_handle():
    page = Elements(slider(start=1)._repr_html_())
    assert [tag for tag, _ in page.found] == ["figure", "img", "br", "label", "input", "output"]
    assert page.one("img")["alt"] == 'digits "fade" <to> noise & more'
    handle = page.one("input")
    assert handle["type"] == "range"
    assert (handle["min"], handle["max"], handle["value"]) == ("0", "3", "1")
    assert handle["aria-label"] == "t"
    assert handle["aria-valuetext"] == NASTY[1]
    assert page.text["output"] == NASTY[1]


def test_slider_labels_reach_the_script_as_they_are():
    handle = Elements(slider()._repr_html_()).one("input")
    assert json.loads(handle["data-labels"]) == NASTY
    script = handle["oninput"]
    assert "JSON.parse(this.dataset.labels)[this.value]" in script
    assert "100*this.value/3+'% 0'" in script
    assert "{" not in script.replace("{next}", "")


def test_slider_picture_is_the_frames_side_by_side():
    x = tiles(4)
    image = Elements(slider(scale=5, start=2)._repr_html_()).one("img")
    kind, content = image["src"].split(",")
    assert kind == "data:image/png;base64"
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
    assert strip.shape == (2, 16, 3)
    for i in range(4):
        assert (strip[:, 4 * i : 4 * i + 4] == x[i].permute(1, 2, 0).numpy()).all()
    style = dict(rule.split(":", 1) for rule in image["style"].split(";"))
    assert style["width"] == "20px"
    assert style["aspect-ratio"] == "4/2"
    assert style["object-fit"] == "cover"
    # At p per cent, that much of the strip meets that much of the window: frame i at 100 i / 3
    position, vertical = style["object-position"].split()
    assert float(position.rstrip("%")) == pytest.approx(200 / 3, abs=1e-9)
    assert vertical == "0"
    assert style["image-rendering"] == "pixelated"


def test_slider_asks_no_other_host():
    source = slider()._repr_html_()
    assert "http" not in source
    assert "//" not in source.replace(source.split('"data:')[1].split('"')[0], "")
    assert "<script" not in source


def test_slider_is_deterministic_and_starts_from_the_end_too():
    assert slider()._repr_html_() == slider()._repr_html_()
    assert slider(start=-1)._repr_html_() == slider(start=3)._repr_html_()
    assert repr(slider()) == "<slider over t, 4 frames>"


def test_slider_takes_numbers_as_labels():
    page = Elements(viz.Slider(tiles(2), [0, 500], alt="two")._repr_html_())
    assert json.loads(page.one("input")["data-labels"]) == ["0", "500"]


@pytest.mark.parametrize(
    ("frames", "labels", "message"),
    [
        (tiles(1), ["a"], "expected at least two frames"),
        (tiles(3), ["a", "b"], r"got \(3, 3, 2, 4\) and 2 labels"),
        (tiles(3)[0], ["a", "b", "c"], "expected at least two frames"),
        (tiles(2, h=1, w=8001), ["a", "b"], "wider than browsers take; .*16,000"),
    ],
)
def test_slider_refuses(frames, labels, message):
    with pytest.raises(ValueError, match=message):
        viz.Slider(frames, labels, alt="x")


def test_the_widest_slider_is_taken():
    assert viz.Slider(tiles(2, h=1, w=8000), ["a", "b"], alt="x")._repr_html_()


def test_a_sheet_sets_the_images_apart():
    black = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    picture = np.asarray(Image.open(io.BytesIO(viz.sheet(black))))
    assert picture.shape == (2 * 33, 2 * 3 * 33)
    column = picture[0]
    assert [(column[66 * k : 66 * k + 66] == 0).sum() for k in range(3)] == [64, 64, 64]
    assert (column[[64, 65, 130, 131]] == 255).all()
