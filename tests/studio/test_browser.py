"""The page in a real browser: headless Chromium, driven by Selenium, with streetnet and nano.

Screenshots go to ``$PYSEG_SCREENSHOTS`` where that is set.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pyseg
from pyseg.classes import CAMVID_CLASSES
from pyseg.formats.annotation import Given
from pyseg.formats.table import find_format

from .conftest import labels_on_disk

webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("uvicorn")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="neither chromium nor chromedriver: no browser here"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
)
ASSETS = Path(pyseg.__file__).parent / "assets"
HOSTILE = "<img src=x onerror=alert(1)>"


class Server:
    """``pyseg studio`` as its user starts it."""

    def __init__(self, folder, out="out", *more):
        self.out = folder / out
        self.call = [sys.executable, "-m", "pyseg", "studio", str(folder / "photos")]
        self.call += ["--spec", "streetnet", "-o", str(self.out), "--no-browser"]
        self.call += ["--token", "a-token-of-the-tests", *more]
        self.port = "0"
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [*self.call, "--port", self.port], stdout=subprocess.PIPE, text=True
        )
        self.address = self.process.stdout.readline().strip()
        self.port = self.address.partition("/#")[0].rpartition(":")[2]

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with photos and their true labels."""
    folder = tmp_path_factory.mktemp("studio")
    for name in ("photos", "truth"):
        (folder / name).mkdir()
    street, labels = Image.open(ASSETS / "street.jpg"), Image.open(ASSETS / "street_labels.png")
    for name, box in (("a", (0, 90, 301, 303)), ("b", (150, 60, 407, 271)), ("c", None)):
        street.crop(box).save(folder / "photos" / f"{name}.jpg")
        labels.crop(box).save(folder / "truth" / f"{name}.png")
    (folder / "photos" / f"{HOSTILE}.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    return folder


@pytest.fixture(scope="module")
def server(work):
    found = Server(work, "out", "--truth", str(work / "truth"))
    yield found
    found.kill()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    found.set_script_timeout(120)
    yield found
    found.quit()


class Page:
    def __init__(self, driver, server):
        self.driver, self.server = driver, server

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition, seconds=120):
        """Until an expression of the page is true, which may still be loading."""
        end = time.monotonic() + seconds
        loaded = "document.readyState === 'complete' && typeof studio !== 'undefined'"
        while not self.run(f"return Boolean({loaded} && ({condition}))"):
            if time.monotonic() > end:
                said = self.run("return [$('status').textContent, $('alert').textContent]")
                raise AssertionError(f"{condition} did not come true; the page says {said}")
            time.sleep(0.02)

    def settle(self):
        """Until all steps are answered and drawn."""
        self.driver.execute_async_script(
            "const end = arguments[0]; setTimeout(() => steps.then(() => requestAnimationFrame("
            "() => requestAnimationFrame(end))), 0)"
        )

    def load(self, name="a"):
        self.driver.get("about:blank")
        self.driver.get(self.server.address)
        self.wait("studio && (view || !$('alert').hidden)")
        self.open(name)

    def open(self, name):
        self.run("open(studio.items.findIndex((item) => item.name === arguments[0]))", name)
        self.wait(f"view && studio.items[index].name === '{name}' && $('busy').hidden")
        self.settle()

    def at(self, x, y):
        """A place of the image, from the middle of the canvas as Selenium counts."""
        found = self.run(
            "return [look.x + arguments[0] * look.scale - canvas.clientWidth / 2, "
            "look.y + arguments[1] * look.scale - canvas.clientHeight / 2]",
            x,
            y,
        )
        return [round(value) for value in found]

    def pointer(self, *places):
        """Presses at the first place, moves over the others, lets go at the last."""
        chain = webdriver.ActionChains(self.driver, duration=20)
        canvas = self.driver.find_element("id", "canvas")
        for k, place in enumerate(places):
            chain.move_to_element_with_offset(canvas, *self.at(*place))
            if k == 0:
                chain.click_and_hold()
        chain.release().perform()
        self.settle()

    def keys(self, *keys):
        chain = webdriver.ActionChains(self.driver)
        for key in keys:
            if isinstance(key, tuple):  # held, pressed
                chain.key_down(key[0]).send_keys(key[1]).key_up(key[0])
            else:
                chain.send_keys(key)
        chain.perform()
        self.settle()

    def map(self):
        size = self.run("return view.size")
        return np.array(self.run("return [...state.map]")).reshape(size)

    def state(self, name):
        return self.run(f"return state.{name}")

    def shot(self, name):
        if folder := os.environ.get("PYSEG_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def complaints(self):
        """What the browser's console has of errors of the page itself."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE" and "Failed to load resource" not in entry["message"]
        ]


def opened(driver, server):
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.set_window_size(1280, 900)
    return Page(driver, server)


@pytest.fixture
def page(driver, server):
    found = opened(driver, server)
    yield found
    assert found.complaints() == []


@pytest.fixture
def objects(driver, work):
    """The page of a server where objects are edited, not a label map."""
    server = Server(work, "objects", "--edit", "instances")
    found = opened(driver, server)
    yield found
    server.kill()
    assert found.complaints() == []


KEY = webdriver.Keys


def test_load_segment_click_accept_undo(page):
    page.load()
    assert page.driver.title == "pyseg studio"
    begun = page.map()
    assert begun.shape == (213, 301) and (begun >= 0).all()
    assert float(page.run("return $('stages').tBodies[0].rows[0].cells[1].textContent")) > 0
    page.keys("9")  # Car
    page.pointer((100, 150))
    assert page.state("asked.points.length") == 1 and page.state("mask") is not None
    assert page.state("asked.label") == "Car"
    page.shot("click-1280")
    page.keys((KEY.SHIFT, "m"), "m")
    page.pointer((60, 60))
    assert page.state("asked.positive") == [True, False]
    page.keys("m")
    mask = np.array(page.run("return [...state.mask]")).reshape(begun.shape).astype(bool)
    page.keys(KEY.ENTER)
    assert (page.map()[mask] == 8).all() and page.state("mask") is None
    assert np.array_equal(page.map()[~mask], begun[~mask])
    assert np.array_equal(labels_on_disk(page.server.out, "a"), page.map())
    for _ in range(3):
        page.keys((KEY.CONTROL, "z"))
    assert np.array_equal(page.map(), begun) and not page.state("undo")
    page.keys((KEY.CONTROL, "y"), (KEY.CONTROL, "y"), (KEY.CONTROL, "y"))
    assert (page.map()[mask] == 8).all()


def test_brush_eraser_fill_box_and_select(page):
    page.load("b")
    page.keys("b", "2")  # Building
    page.run("$('size').value = 14; $('size').dispatchEvent(new Event('input'))")
    page.pointer((30, 30), (80, 60), (120, 60))
    painted = page.map()
    assert painted[30, 30] == painted[45, 55] == painted[60, 100] == painted[54, 100] == 1
    page.keys("e", "[", "[")
    page.pointer((80, 60), (100, 60))
    erased = page.map()
    assert erased[60, 90] == -1 and erased[54, 90] == 1 and (erased == -1).sum() < 400
    page.keys("f", "1")  # Sky
    page.pointer((90, 60))
    assert page.map()[60, 90] == 0 and not (page.map() == -1).any()
    page.keys("x")
    page.pointer((20, 100), (120, 180))
    box = page.state("asked.box")
    assert np.abs(np.array(box) - (20, 100, 120, 180)).max() < 2
    page.keys(KEY.ESCAPE)
    assert page.state("asked") is None
    page.keys("s")
    page.pointer((90, 60))
    assert page.state("asked.selected") is not None
    page.shot("brush-1280")
    page.driver.refresh()
    page.wait("view && studio.items[index].name === 'b'")
    assert page.map()[60, 90] == 0 and page.state("asked.selected") is not None
    assert page.state("undo")


def test_everything_by_keyboard(page):
    page.load()
    before = page.map()
    page.run("canvas.focus(); cross.x = 150.5; cross.y = 100.5")
    page.keys("b", "3", " ", *[(KEY.SHIFT, KEY.ARROW_RIGHT)] * 3, KEY.ARROW_DOWN, " ")
    painted = page.map()
    assert painted[100, 150] == painted[100, 175] == painted[101, 180] == 2
    assert (painted != before).any()
    page.keys("x", " ", *[(KEY.SHIFT, KEY.ARROW_UP)] * 3, *[(KEY.SHIFT, KEY.ARROW_LEFT)] * 3, " ")
    assert page.state("asked.box") == [150.5, 71.5, 180.5, 101.5]
    page.keys("c", " ", (KEY.SHIFT, " "))
    assert page.state("asked.positive") == [True, False]
    page.keys(KEY.ESCAPE, "v", "o")
    assert page.run("return [mode, $('opacity').value]") == ["swipe", "45"]
    page.keys("v", "v", "O", "+", "-", "0", ".", ",")
    # Tab reaches every control, and what has the focus shows it.
    reached = page.run(
        "return [...document.querySelectorAll('button, select, input, a, summary, canvas')]"
        ".filter((one) => one.tabIndex < 0).length"
    )
    assert reached == 0
    first = page.run("return index")
    page.keys("n")
    page.wait(f"index === {first + 1} && $('busy').hidden")
    page.keys("p")
    page.wait(f"index === {first} && $('busy').hidden")


def test_preview_under_the_pointer(page):
    page.load()
    canvas = page.driver.find_element("id", "canvas")
    webdriver.ActionChains(page.driver).move_to_element_with_offset(
        canvas, *page.at(100, 150)
    ).perform()
    page.wait("hovered")
    assert page.state("mask") is None and page.state("asked") is None


def test_views_truth_errors_and_uncertainty(page):
    page.load("c")
    sources = page.run("return [...$('left').options].map((option) => option.value)")
    assert {"map", "stage 0", "truth", "error", "error 0", "doubt 0", "image"} <= set(sources)

    def colours(x, y):
        page.settle()
        return page.run(
            "return [...context.getImageData(...arguments, 1, 1).data.slice(0, 3)]", x, y
        )

    x, y = page.run("return [look.x + 30 * look.scale, look.y + 350 * look.scale].map(Math.round)")
    page.run("$('opacity').value = 100")
    seen = []
    for source in ("map", "truth", "error", "doubt 0", "image"):
        page.run("$('left').value = arguments[0]; draw()", source)
        if source == "doubt 0":
            page.wait("layers.has('doubt 0')")
        seen.append(colours(x, y))
    assert seen[0] == page.run("return studio.palette[state.map[350 * view.size[1] + 30]]")
    assert seen[1] == page.run("return studio.palette[view.truth[350 * view.size[1] + 30]]")
    assert seen[2] in ([222, 226, 230], [214, 40, 57])
    page.run("$('left').value = 'map'; $('right').value = 'image'; setMode('swipe')")
    page.run("$('split').value = 0; draw()")
    assert colours(x, y) == seen[4]
    page.run("$('split').value = 100; draw()")
    assert colours(x, y) == seen[0]
    page.run("hidden.add(state.map[350 * view.size[1] + 30]); layers.clear(); draw()")
    assert colours(x, y) == seen[4]
    page.run("hidden.clear(); layers.clear(); setMode('side'); $('right').value = 'error'; draw()")
    page.run("$('opacity').value = 55")
    page.settle()
    page.shot("side-1280")


def test_a_wrong_spec_says_what_is_wrong(page):
    page.load()
    page.run("$('spec').value = 'streetnet+krf'; $('spec-form').requestSubmit()")
    page.wait("!$('spec-error').hidden")
    assert "Did you mean 'crf'" in page.run("return $('spec-error').textContent")
    assert page.run("return studio.spec") == "streetnet"
    page.run("$('spec').value = 'streetnet+'; $('spec').oninput()")
    names = page.run("return [...$('spec-names').options].map((option) => option.value)")
    assert "streetnet+crf" in names
    page.run("$('spec').value = 'streetnet+temperature(value=2)'; $('spec-form').requestSubmit()")
    page.wait("view.stages.length === 2 && $('busy').hidden")
    page.run("$('spec').value = 'streetnet'; $('spec-form').requestSubmit()")
    page.wait("view.stages.length === 1 && $('busy').hidden")


def test_a_hostile_file_is_named_and_passed_over(page):
    page.load()
    page.run("open(studio.items.findIndex((item) => item.name.startsWith('<')))")
    page.wait("!$('alert').hidden && $('busy').hidden")
    assert "onerror" in page.run("return $('alert').textContent")
    assert page.run("return document.querySelectorAll('img').length") == 0
    assert page.run("return $('accept').disabled && $('done').disabled")
    page.open("c")
    assert page.run("return $('alert').hidden")


def test_two_tabs_notice_each_other(page):
    page.load()
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.load()
    page.keys("b", "4")
    page.pointer((20, 20), (40, 20))
    changed = page.map()
    page.run("state.revision -= 1")  # as a tab that was not told
    page.pointer((200, 100))
    assert "changed elsewhere" in page.run("return $('alert').textContent")
    assert np.array_equal(page.map(), changed)
    page.driver.close()
    page.driver.switch_to.window(first)
    page.wait("!document.hidden")
    page.run("document.dispatchEvent(new Event('visibilitychange'))")
    page.settle()
    assert np.array_equal(page.map(), changed)


def test_a_killed_server_loses_nothing(page):
    page.load()
    page.keys("b", "5")
    page.pointer((60, 60), (90, 60))
    page.keys("c")
    page.pointer((100, 150))
    map_, points = page.map(), page.state("asked.points")
    page.server.kill()
    page.pointer((30, 30))
    assert "does not answer" in page.run("return $('alert').textContent")
    page.server.start()
    page.driver.refresh()
    page.wait("view && studio.items[index].name === 'a'")
    assert np.array_equal(page.map(), map_) and page.state("asked.points") == points


def test_queue_done_and_unsure_first(page):
    page.load("a")
    page.keys("d")
    page.wait("index !== null && view && studio.items[index].name === 'b' && $('busy').hidden")
    assert page.run("return $('progress').textContent").startswith("1 of 4 done")
    page.run("$('survey').click()")
    page.wait(
        "!studio.surveying && studio.items.filter((item) => item.unsure !== null).length === 3"
    )
    page.run("$('unsure').click()")
    unsure = page.run("return order().map((k) => [studio.items[k].done, studio.items[k].unsure])")
    weights = [-2 if done else -1 if value is None else value for done, value in unsure]
    assert weights == sorted(weights, reverse=True)
    page.run("$('unsure').click()")


def test_upload_and_loaded_map(page, tmp_path):
    page.load()
    Image.open(ASSETS / "street.jpg").crop((0, 0, 90, 70)).save(tmp_path / "new.png")
    page.driver.find_element("id", "upload").send_keys(str(tmp_path / "new.png"))
    page.wait("view && studio.items[index].name === 'new' && $('busy').hidden")
    labels = np.random.default_rng(0).integers(0, 11, (70, 90)).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "map.png")
    page.driver.find_element("id", "load").send_keys(str(tmp_path / "map.png"))
    page.wait("state.undo")
    page.settle()
    assert np.array_equal(page.map(), labels)
    page.keys((KEY.CONTROL, "z"))
    (tmp_path / "wrong.png").write_text("no image")
    page.driver.find_element("id", "load").send_keys(str(tmp_path / "wrong.png"))
    page.wait("!$('alert').hidden")
    assert "is not an image" in page.run("return $('alert').textContent")


CONTRAST = """
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92
  : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
const rgba = (text) => {
  const numbers = text.match(/[\\d.]+/g).map(Number);
  return numbers.length < 4 ? [...numbers, 1] : numbers;
};
const found = [];
for (const one of document.querySelectorAll('body *')) {
  const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !one.getClientRects().length || one.closest('select, .skip')) continue;
  let at = one, back = [255, 255, 255, 0];
  for (; at && back[3] === 0; at = at.parentElement) {
    back = rgba(getComputedStyle(at).backgroundColor);
  }
  const [a, b] = [light(rgba(getComputedStyle(one).color)), light(back)];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  found.push([ratio, one.tagName + ' ' + one.textContent.trim().slice(0, 30)]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa(page, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.load()
    page.run("document.querySelector('details').open = true; complain(new Error('An error'))")
    page.run("complain(new Error('An error'), 'spec-error')")
    found = page.run(CONTRAST)
    page.shot(f"{scheme}-1280")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(found) > 60
    assert [text for ratio, text in found if ratio < 4.5] == []


def test_every_control_has_a_name(page):
    page.load()
    nameless = page.run(
        "return [...document.querySelectorAll('button, select, input, canvas, progress')].filter("
        "(one) => !(one.textContent.trim() || one.ariaLabel || (one.labels && one.labels.length)))"
        ".map((one) => one.outerHTML)"
    )
    assert nameless == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
    size = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": width < 600}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.load("c")
    page.shot(f"page-{width}")
    wide = page.run(
        "return [...document.querySelectorAll('body *')].filter((one) => "
        "!one.closest('.scroll, .skip') && one.getBoundingClientRect().right"
        " > document.documentElement.clientWidth + 0.5).map((one) => one.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert page.run("return document.documentElement.scrollWidth") <= width
    small = page.run(
        "return [...document.querySelectorAll('button')].filter((one) => "
        "one.getClientRects().length && Math.min(one.offsetWidth, one.offsetHeight) < 24)"
        ".map((one) => one.textContent)"
    )
    assert small == []  # WCAG 2.2, 2.5.8
    page.keys(KEY.ESCAPE, "c")
    page.pointer((200, 180))
    assert page.state("asked.points.length") == 1
    page.shot(f"prompt-{width}")


def test_objects_are_added_selected_corrected_and_removed(objects):
    page = objects
    page.load()
    assert page.state("objects") == []  # streetnet finds none
    listed = (
        "return [...document.querySelectorAll('#objects button')].map((one) => one.textContent)"
    )

    def kept():
        """Class and mask of each object that the server has kept."""
        path = page.server.out / "instances" / "a.json"
        source = find_format("coco").open_source(path, Given(classes=CAMVID_CLASSES))
        found = source.read(source.names[0]).instances()
        names = [CAMVID_CLASSES[label] for label in found.labels.tolist()]
        return list(zip(names, (mask.numpy() for mask in found.masks), strict=True))

    page.keys("9")  # Car
    page.pointer((100, 150))
    mask = np.array(page.run("return [...state.mask]")).reshape(213, 301).astype(bool)
    page.keys(KEY.ENTER)
    ((name, car),) = kept()
    assert name == "Car" and np.array_equal(car, mask)
    assert page.run(listed) == [f"1 Car, {mask.sum()} pixels"]

    page.keys(KEY.ESCAPE, "b", "2")  # a Building, over a part of the car
    page.run("$('size').value = 20; $('size').dispatchEvent(new Event('input'))")
    page.pointer((100, 150), (140, 150))
    (_, car), (name, wall) = kept()
    assert name == "Building" and wall[150, 120] and np.array_equal(car, mask)
    assert [text.split(",")[0] for text in page.run(listed)] == ["1 Car", "2 Building"]

    # Of two that overlap, the list selects the one that is named; it keeps its class.
    page.keys(KEY.ESCAPE)
    page.run("$('objects').querySelectorAll('button')[0].click()")
    page.settle()
    assert page.state("asked.label") == "Car"
    page.keys("b")
    page.pointer((20, 20), (40, 20))
    page.keys("e")
    page.pointer((100, 150))
    (_, car), (_, wall_now) = kept()
    assert car[20, 30] and not car[150, 100] and np.array_equal(wall_now, wall)
    page.shot("objects-1280")
    page.keys(KEY.DELETE)
    assert [name for name, _ in kept()] == ["Building"]
    page.keys((KEY.CONTROL, "z"))
    assert len(kept()) == 2 and len(page.run(listed)) == 2
    page.driver.refresh()
    page.wait("view && studio.items[index].name === 'a' && state.objects.length === 2")
    assert len(page.run(listed)) == 2
