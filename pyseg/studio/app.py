"""The web application: a page, what it asks for, and ``POST /segment`` for programs.

Every request but those for the page itself must carry the token in the header ``Authorization``,
which no other site can make a browser send; there are no cookies. Images are named by their number
in the queue, never by a path.
"""

from __future__ import annotations

import asyncio
import hmac
import io
import os
import secrets
import socket
import tempfile
import time
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import BackgroundTasks, Body, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from PIL import Image
from pydantic import BaseModel, Field

from .. import __version__, models, refiners
from ..errors import ImageError, PysegError
from ..image import read_image
from ..regions import Instances
from ..session import Session
from ..types import Segmentation
from .desk import CLICKS, Conflict, Desk, Document, doubt, plain, runs, stroke
from .dispatch import Busy, Dispatcher

STATIC = Path(__file__).with_name("static")
_PAGE = {"/": "index.html", "/studio.js": "studio.js", "/studio.css": "studio.css"}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What a server takes of anybody."""

    upload: int = 64 << 20  # bytes of an image
    text: int = 1 << 20  # bytes of any other request
    patience: float = 30.0  # seconds between two parts of a request
    seconds: float = 60.0  # that a program waits for its result
    waiting: int = 64  # programs' requests that wait to be computed
    batch: int = 8  # of these, computed at a time


class _Guard:
    """Before anything else: who asks, for which host, and how much is sent."""

    def __init__(self, app: Any, *, token: str, hosts: Sequence[str] | None, limits: Limits):
        self.app, self.token, self.hosts, self.limits = app, token, hosts, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            code, text = refusal
            # A body that is not read would be taken for the next request.
            close = {**_HEADERS, "Connection": "close"}
            await JSONResponse({"error": text}, code, close)(scope, receive, send)
            return
        await self.app(scope, self._counted(receive, self._most(scope)), _with_headers(send))

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0].strip("[]")
        if self.hosts is not None and host not in self.hosts:
            # A name of somebody else's that leads here: DNS rebinding.
            return 421, f"this server is not {host[:80]!r}"
        if scope["path"] not in _PAGE:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                return 401, "the token is absent or wrong; open the address that the server printed"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most(scope):
            return 413, f"more than {self._most(scope)} bytes are not taken"
        return None

    def _most(self, scope: Scope) -> int:
        raw = scope["path"] in ("/segment", "/api/items") or scope["path"].endswith("/map")
        return self.limits.upload if raw else self.limits.text

    def _counted(self, receive: Receive, most: int) -> Receive:
        count, ended = 0, False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal count, ended
            if ended:  # what comes now is the client's leaving
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.limits.patience)
            except asyncio.TimeoutError as error:
                raise HTTPException(408, "the request did not come to an end") from error
            count += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if count > most:
                raise HTTPException(413, f"more than {most} bytes are not taken")
            return message

        return counted


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            extra = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]
            message["headers"] = [*message["headers"], *extra]
        await send(message)

    return sending


# --- what is sent -------------------------------------------------------------------------------

Class = Annotated[str | int | None, Field(description="Name or index; 'void'; null = as before.")]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Click(BaseModel):
    do: Literal["click"]
    x: Number
    y: Number
    positive: bool = True
    label: Class = None

    def on(self, session: Session) -> None:
        session.click(self.x, self.y, self.positive, self.label)


class Box(BaseModel):
    do: Literal["box"]
    x0: Number
    y0: Number
    x1: Number
    y1: Number
    label: Class = None

    def on(self, session: Session) -> None:
        session.box(self.x0, self.y0, self.x1, self.y1, self.label)


class Brush(BaseModel):
    """A stroke of a round brush; of the class ``"void"`` it erases."""

    do: Literal["brush"]
    points: Annotated[list[tuple[Number, Number]], Field(min_length=1, max_length=4096)]
    radius: Annotated[float, Field(gt=0, le=4096)]
    label: Class = None

    def on(self, session: Session) -> None:
        session.brush(stroke(self.points, self.radius, session.size), self.label)


class Place(BaseModel):
    """``select`` takes up what is there, ``fill`` paints it."""

    do: Literal["select", "fill"]
    x: Number
    y: Number
    label: Class = None

    def on(self, session: Session) -> None:
        if self.do == "fill":
            session.fill(self.x, self.y, self.label)
        else:
            session.select(self.x, self.y)


class Plain(BaseModel):
    do: Literal["accept", "clear", "undo", "redo"]
    label: Class = None

    def on(self, session: Session) -> None:
        if self.do == "accept":
            session.accept(self.label)
        else:
            getattr(session, self.do)()


class Start(BaseModel):
    """Puts a stage's map, or one that is void, in place of the present one."""

    do: Literal["start"]
    stage: Annotated[int | None, Field(description="Number of the stage; null = all void.")] = None


Step = Annotated[Click | Box | Brush | Place | Plain | Start, Field(discriminator="do")]


class Settings(BaseModel):
    spec: Annotated[str | None, Field(max_length=4096)] = None
    clicks: Literal["nano", "flood"] | None = None


class Switch(BaseModel):
    on: bool


class Target(BaseModel):
    to: Literal["coco", "labelme"]


# --- what is answered ---------------------------------------------------------------------------


def _state(document: Document) -> dict[str, Any]:
    """What a page shows of a document that can change."""
    session = document.session
    result = session.result
    labels = plain(result)
    pending = session.pending
    asked = session.asked
    return {
        "revision": document.revision,
        "undo": session.undoable,
        "redo": session.redoable,
        "done": document.item.done,
        "saved": document.item.saved,
        "map": runs(labels),
        **_objects(result.instances),
        "scores": _scores(labels, document.truth),
        "mask": None if pending is None else runs(pending.mask.numpy()),
        "score": None if pending is None else pending.score,
        "asked": None if asked is None else asked._asdict(),
    }


def _objects(instances: Instances | None) -> dict[str, Any]:
    """Of instances, the number of the front one of each pixel, -1 = none, and what each is."""
    if instances is None:
        return {"ids": None, "objects": None}
    order = instances.scores.argsort(stable=True)  # the most certain in front, as in `select`
    front = np.full(instances.masks.shape[1:], -1, np.int32)
    for k in order.tolist():
        front[instances.masks[k].numpy()] = k
    objects = []
    for k, label in enumerate(instances.labels.tolist()):
        rows, columns = np.nonzero(front == k)
        middle = len(rows) // 2
        objects.append(
            {
                "label": label,
                "score": float(instances.scores[k]),
                "area": int(instances.masks[k].sum()),
                "at": [int(columns[middle]), int(rows[middle])] if len(rows) else None,
            }
        )
    return {"ids": runs(front), "objects": objects}


def _view(document: Document) -> dict[str, Any]:
    stages = [
        {
            "name": stage.name,
            "milliseconds": round(stage.milliseconds, 1),
            "peak_bytes": stage.peak_bytes,
            "map": runs(plain(stage.prediction)),
            "doubt": _has_doubt(stage.prediction),
            "scores": _scores(plain(stage.prediction), document.truth),
        }
        for stage in document.stages
    ]
    return {
        "name": document.item.name,
        "size": list(document.session.size),
        "stages": stages,
        "truth": None if document.truth is None else runs(document.truth),
        **_state(document),
    }


def _has_doubt(prediction: Segmentation) -> bool:
    return prediction.uncertainty is not None or prediction.logits is not None


def _scores(labels: np.ndarray, truth: np.ndarray | None) -> dict[str, float] | None:
    """Pixel accuracy, and mean IoU over the classes of either map, where there is a truth."""
    if truth is None or not (known := truth >= 0).any():
        return None
    labels, truth = labels[known], truth[known]
    found = [
        np.count_nonzero((labels == k) & (truth == k))
        / np.count_nonzero((labels == k) | (truth == k))
        for k in np.union1d(labels[labels >= 0], truth)
    ]
    return {"accuracy": float(np.mean(labels == truth)), "miou": float(np.mean(found))}


# --- the application ----------------------------------------------------------------------------


def create_app(
    desk: Desk,
    token: str,
    *,
    hosts: Sequence[str] | None = _LOOPBACK,
    limits: Limits | None = None,
) -> Any:
    """An ASGI application for a desk.

    Args:
        desk: images, pipeline and output.
        token: that every request must have, at least 16 characters.
        hosts: names by which the server may be called; None = any.
        limits: of requests.

    Raises:
        ValueError: the token is too short.
    """
    if len(token) < 16:
        raise ValueError(f"token must have at least 16 characters, got {len(token)}")
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        coders.shutdown(cancel_futures=True)
        dispatcher.close()
        desk.close()

    app = FastAPI(
        title="pyseg studio",
        version=__version__,
        docs_url=None,  # whose pages would load scripts of other sites
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(HTTPBearer(auto_error=False))],  # for the description; see _Guard
    )
    dispatcher = Dispatcher(
        lambda images: desk.pipeline(images), batch=limits.batch, waiting=limits.waiting
    )
    # More threads than cores decode no sooner, and each would keep memory of its own.
    coders = ThreadPoolExecutor(os.cpu_count() or 1, "pyseg-coder")
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=1)
    app.add_middleware(_Guard, token=token, hosts=hosts, limits=limits)  # type: ignore[arg-type]
    _add_errors(app)
    _add_page(app)
    _add_desk(app, desk)
    _add_documents(app, desk)
    _add_segment(app, desk, dispatcher, coders, limits)
    return app


def _add_errors(app: FastAPI) -> None:
    def answer(code: int) -> Callable[[Request, Exception], JSONResponse]:
        def handler(_: Request, error: Exception) -> JSONResponse:
            more = {"Retry-After": "1"} if code == 503 else None
            return JSONResponse({"error": str(error)}, code, more)

        return handler

    def of_http(_: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    def of_body(_: Request, error: Any) -> JSONResponse:
        said = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5]]
        return JSONResponse({"error": "; ".join(said)}, 422)

    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_body)
    # The most special class is looked up first.
    app.add_exception_handler(Busy, answer(503))
    app.add_exception_handler(Conflict, answer(409))
    app.add_exception_handler(PysegError, answer(422))
    app.add_exception_handler(IndexError, answer(404))


def _add_page(app: FastAPI) -> None:
    for address, name in _PAGE.items():
        app.add_api_route(
            address,
            lambda name=name: FileResponse(STATIC / name),
            include_in_schema=False,
            response_class=FileResponse,
        )


def _add_desk(app: FastAPI, desk: Desk) -> None:
    @app.get("/api/studio")
    def studio() -> dict[str, Any]:
        """Pipeline, classes and queue."""
        return {
            "spec": str(desk.pipeline),
            "classes": list(desk.classes),
            "palette": [list(colour) for colour in desk.palette],
            "edit": desk.edit,
            "clicks": desk.clicked,
            "clickers": list(CLICKS),
            "models": models.list(),
            "refiners": refiners.list(),
            "output": str(desk.output),
            **queue(),
        }

    @app.put("/api/studio")
    def configure(settings: Settings) -> dict[str, Any]:
        """Another pipeline, or something else to answer clicks."""
        try:
            desk.configure(spec=settings.spec, clicks=settings.clicks)
        except (ValueError, ImportError, OSError) as error:  # options, extras, files
            raise PysegError(str(error)) from error
        return studio()

    @app.get("/api/items")
    def queue() -> dict[str, Any]:
        """The images, and whether the survey of their doubt goes on."""
        items = [{**asdict(item), "path": item.path.name} for item in desk.items]
        return {"items": items, "surveying": desk.surveying}

    @app.post("/api/items", status_code=201, openapi_extra=_RAW)
    async def upload(request: Request, name: Annotated[str, Query(max_length=1000)]) -> Any:
        """Adds an image to the queue: the file is the body."""
        content = await request.body()
        return {"index": await run_in_threadpool(desk.add, name, _writer(content))}

    @app.post("/api/survey")
    def survey(switch: Switch) -> dict[str, Any]:
        """Begins to segment all that is not done, to know how unsure each is; or stops that."""
        desk.survey(switch.on)
        return queue()

    @app.post("/api/export")
    def export_all(target: Target) -> dict[str, Any]:
        """Writes all maps beside the output's ``labels``, and says what the format loses."""
        return {"lines": desk.export_all(target.to)}


def _add_documents(app: FastAPI, desk: Desk) -> None:
    @app.get("/api/items/{index}")
    def view(index: int, background: BackgroundTasks) -> dict[str, Any]:
        """An image's stages, truth, map and prompt. Maps are runs of class indices, -1 = void."""
        document = desk.open(index)
        with document.lock:
            found = _view(document)
        background.add_task(desk.embed, index)
        return found

    @app.get("/api/items/{index}/state")
    def state(index: int) -> dict[str, Any]:
        """Map and prompt alone."""
        document = desk.open(index)
        with document.lock:
            return _state(document)

    @app.get("/api/items/{index}/image", response_class=Response)
    def picture(index: int) -> Response:
        """The image as JPEG, turned as its camera says."""
        pixels = desk.open(index).image.permute(1, 2, 0).numpy()
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=92)
        return Response(stream.getvalue(), media_type="image/jpeg")

    @app.get("/api/items/{index}/doubt/{stage}", response_class=Response)
    def doubts(index: int, stage: int) -> Response:
        """How unsure a stage is of each pixel: H x W bytes, 255 = fully."""
        stages = desk.open(index).stages
        if not 0 <= stage < len(stages):
            raise IndexError(f"there is no stage {stage}: the pipeline has {len(stages)}")
        found = doubt(stages[stage].prediction)
        if found is None:
            raise PysegError(f"stage {stages[stage].name!r} cannot tell how unsure it is")
        content = (found * 255).round().byte().numpy().tobytes()
        return Response(content, media_type="application/octet-stream")

    @app.post("/api/items/{index}/step")
    def step(
        index: int, step: Annotated[Step, Body()], revision: int | None = None
    ) -> dict[str, Any]:
        """A click, box, stroke, fill, selection, acceptance, undo or redo.

        With ``revision`` it is refused (409) where another page has changed the image since.
        """
        done = _start(desk, index, step) if isinstance(step, Start) else step.on
        document = desk.act(index, revision, done)
        with document.lock:
            return _state(document)

    @app.post("/api/items/{index}/preview")
    def preview(index: int, click: Click) -> dict[str, Any]:
        """What a click would answer; changes nothing."""
        document = desk.open(index)
        with document.lock:
            answer = document.session.preview(click.x, click.y, click.positive, click.label)
        return {"mask": runs(answer.mask.numpy()), "score": answer.score}

    @app.put("/api/items/{index}/map", openapi_extra=_RAW)
    async def load(request: Request, index: int, revision: int | None = None) -> dict[str, Any]:
        """Puts a label map in place of the present one: a PNG is the body."""
        content = await request.body()

        def put() -> dict[str, Any]:
            with _file(content) as path:
                try:
                    document = desk.act(index, revision, lambda session: session.put(path))
                except ImageError as error:
                    raise ImageError(str(error).replace(str(path), "map")) from error
            with document.lock:
                return _state(document)

        return await run_in_threadpool(put)

    @app.post("/api/items/{index}/done")
    def finish(index: int, switch: Switch) -> dict[str, Any]:
        """Marks an image as looked through, or not."""
        desk.finish(index, switch.on)
        document = desk.open(index)
        with document.lock:
            return _state(document)

    @app.get("/api/items/{index}/export", response_class=Response)
    def export(index: int, to: Literal["indexed", "coco", "labelme"]) -> Response:
        """The map as a file: indexed PNG, COCO's JSON of one image, or labelme's."""
        name, content = desk.export(index, to)
        kind = "image/png" if name.endswith(".png") else "application/json"
        return Response(content, media_type=kind)


def _start(desk: Desk, index: int, step: Start) -> Callable[[Session], None]:
    stages = desk.open(index).stages
    if step.stage is None:
        return lambda session: session.put(None)
    if not 0 <= step.stage < len(stages):
        raise IndexError(f"there is no stage {step.stage}: the pipeline has {len(stages)}")
    labels = stages[step.stage].prediction.labels.cpu()
    return lambda session: session.put(labels)


def _add_segment(
    app: FastAPI, desk: Desk, dispatcher: Dispatcher, coders: ThreadPoolExecutor, limits: Limits
) -> None:
    @app.post("/segment", openapi_extra=_RAW, response_class=Response)
    async def segment(request: Request, to: Literal["png", "json"] = "png") -> Response:
        """Segments an image, which is the body: ``curl --data-binary @street.jpg``.

        ``png``: the labels, indexed, 255 = void. ``json``: classes, size and runs of labels, -1 =
        void. 422: no image; 413: too large; 503: too many wait, try again; 504: it took too long.
        """
        content = await request.body()
        loop = asyncio.get_running_loop()

        def read() -> Any:
            with _file(content) as path:
                try:
                    return read_image(path)
                except ImageError as error:
                    raise ImageError(str(error).replace(str(path), "body")) from error

        image = await loop.run_in_executor(coders, read)
        future = dispatcher.submit(image)
        begun = time.perf_counter()
        try:
            result = await asyncio.wait_for(asyncio.wrap_future(future), limits.seconds)
        except asyncio.TimeoutError as error:
            raise HTTPException(504, f"no result within {limits.seconds:g} seconds") from error
        waited = {"X-Milliseconds": f"{(time.perf_counter() - begun) * 1e3:.1f}"}
        if to == "json":
            found = {"classes": result.classes, "size": result.size, **runs(plain(result))}
            return JSONResponse(found, headers=waited)
        png = await loop.run_in_executor(coders, _png, result)
        return Response(png, media_type="image/png", headers=waited)


def _png(result: Segmentation) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return result.save(Path(folder) / "labels.png").read_bytes()


_RAW = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def _writer(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


class _file:
    """Bytes as a file, since that is what all checks of hostile images are for."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __enter__(self) -> Path:
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "image"
        path.write_bytes(self.content)
        return path

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()


# --- serving ------------------------------------------------------------------------------------


def serve(
    desk: Desk,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    browser: bool = True,
    announce: Callable[[str], None] = print,
) -> None:
    """Serves a desk until it is interrupted.

    Args:
        desk: what is served.
        host: address to listen on; other machines reach any but the loopback.
        port: 0 = any that is free.
        token: that requests must have; None = a random one, for the loopback only.
        browser: whether to open the page.
        announce: is told the address.

    Raises:
        PysegError: another host without a token, or a token that is too short.
        OSError: the port is taken.
    """
    import uvicorn

    local = host in _LOOPBACK
    if token is None and not local:
        raise PysegError(
            f"host {host!r} lets other machines in: give a token of at least 16 characters, such "
            f"as token={secrets.token_urlsafe(24)!r}, and a proxy with TLS where the network is "
            "not yours"
        )
    token = token or secrets.token_urlsafe(24)
    app = create_app(desk, token, hosts=_LOOPBACK if local else None)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)  # before the address is told: who is early waits, and is not refused
        shown = f"[{host}]" if ":" in host else host
        # After the #, it reaches no server's log and no other site.
        address = f"http://{shown}:{listener.getsockname()[1]}/#token={token}"
        announce(address)
        if browser:
            webbrowser.open(address)
        config = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=256,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[listener])


__all__ = ["Limits", "create_app", "serve"]
