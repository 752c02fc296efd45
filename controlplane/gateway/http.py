"""The gateway's HTTP side: routes, errors in one shape, health that tells the truth."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from controlplane.gateway.api_errors import INVALID_REQUEST, SERVER_ERROR, ApiError
from controlplane.gateway.http_generate import GenerateHandlers, error_response
from controlplane.gateway.http_log import http_logger
from controlplane.gateway.metrics import GatewayMetrics
from controlplane.gateway.models import Catalogue, ServedModel
from controlplane.gateway.render import encode_json
from controlplane.runtime.errors import invalid
from controlplane.runtime.ids import draw_id

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REQUEST_ID = "x-request-id"
_REQUEST_ID_CHARS_MAX = 128


class HttpServer:
    """Listens until `stop`. `ready` says whether anything can be served, and if not why."""

    def __init__(
        self,
        host: str,
        port: int,
        generate: GenerateHandlers,
        catalogue: Catalogue,
        metrics: GatewayMetrics,
        refresh: Callable[[], None],
        ready: Callable[[], tuple[bool, str]],
        body_bytes_max: int,
    ) -> None:
        self._host = host
        self._port = port
        self._generate = generate
        self._catalogue = catalogue
        self._metrics = metrics
        self._refresh = refresh
        self._ready = ready
        self._body_bytes_max = body_bytes_max
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._closing = False

    @property
    def url(self) -> str:
        """Base URL, with the port that was bound."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def start(self) -> None:
        """Bind and listen. Raises Rejected if the port is taken."""
        app = web.Application(client_max_size=self._body_bytes_max, middlewares=[self._frame])
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_post("/v1/completions", self._generate.completions)
        app.router.add_post("/v1/chat/completions", self._generate.chat_completions)
        app.router.add_get("/v1/streams/{stream}", self._generate.resume)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._readiness)
        app.router.add_get("/metrics", self._metrics_page)
        app.on_response_prepare.append(_name_response)
        # A handler whose client is gone is cancelled at once; that is what frees its sequences.
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, logger=http_logger(), handle_signals=False
        )
        await runner.setup()
        site = web.TCPSite(runner, self._host, self._port)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise invalid(f"cannot listen for HTTP on {self._host}:{self._port}: {error.strerror}") from error
        self._runner, self._site = runner, site
        self._port = runner.addresses[0][1]
        log.info("http_listening", url=self.url)

    async def refuse_new(self) -> None:
        """Stop accepting: connections are refused, and requests on open ones answered with 503."""
        self._closing = True
        site, self._site = self._site, None
        if site is not None:
            await site.stop()

    async def stop(self) -> None:
        """End everything that is still open."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    @web.middleware
    async def _frame(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Around every handler: errors in their shape, counts."""
        try:
            if self._closing:
                raise ApiError(503, "this gateway is shutting down", kind=SERVER_ERROR, code="unavailable")
            response = await handler(request)
        except ApiError as error:
            response = error_response(error)
        except web.HTTPException as error:
            response = error_response(_from_http(error, request))
        route = request.match_info.route.resource
        name = route.canonical if route is not None else "unknown"
        self._metrics.http_responses.labels(name, str(response.status)).inc()
        return response

    async def _models(self, _: web.Request) -> web.Response:
        return _json({"object": "list", "data": [_card(model) for model in self._catalogue.all()]})

    async def _model(self, request: web.Request) -> web.Response:
        return _json(_card(self._catalogue.find(request.match_info["model"])))

    async def _health(self, _: web.Request) -> web.Response:
        # Answering at all proves that the process lives and its loop turns.
        await asyncio.sleep(0)
        return _json({"status": "ok"})

    async def _readiness(self, _: web.Request) -> web.Response:
        ready, why = self._ready()
        return _json({"ready": ready, "reason": why}, status=200 if ready else 503)

    async def _metrics_page(self, _: web.Request) -> web.Response:
        self._refresh()
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _name_response(request: web.Request, response: web.StreamResponse) -> None:
    """Every answer carries the client's id of the request, or a new one."""
    given = request.headers.get(_REQUEST_ID, "")[:_REQUEST_ID_CHARS_MAX]
    response.headers[_REQUEST_ID] = given or draw_id()


def _card(model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.seen_wall_s,
        "owned_by": "perdure",
        "root": model.model_path,
        "max_model_len": model.context_tokens or None,
    }


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=encode_json(body), status=status, content_type="application/json")


def _from_http(error: web.HTTPException, request: web.Request) -> ApiError:
    """aiohttp's own refusals in our shape."""
    kind = INVALID_REQUEST if error.status < 500 else SERVER_ERROR
    if isinstance(error, web.HTTPNotFound):
        return ApiError(404, f"unknown path: {request.method} {request.path}", code="unknown_url")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return ApiError(405, f"{request.method} is not allowed here, only {allowed}", code="method_not_allowed")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return ApiError(413, "the body is too large", code="body_too_large")
    return ApiError(error.status, error.text or error.reason, kind=kind)
