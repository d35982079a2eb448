"""The services that endpoints use, and FastAPI dependencies for the tenant and the admin."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute

from service.batches.batch_planner import BatchPlanner
from service.batches.batch_service import BatchService
from service.broker.pool_state import PoolView
from service.config import Config
from service.errors import (
    CoeError,
    InvalidRequestError,
    StoreUnavailableError,
    UnauthorizedError,
)
from service.gateway.added_experts import AddedExpertService
from service.gateway.admission import Admission
from service.gateway.audit_log import REFUSALS, acted
from service.gateway.dispatch.recipe_executor import RecipeExecutor
from service.gateway.request.request_intake import RequestIntake
from service.gateway.routing.alias_resolution import AliasResolution
from service.gateway.routing.alias_traffic import AliasTraffic
from service.gateway.routing.candidate_planner import CandidatePlanner
from service.gateway.routing.feedback_learning import FeedbackService
from service.gateway.routing.session_affinity import SessionService
from service.gateway.state_across_reloads import GatewayState
from service.http.asgi_helpers import read_body
from service.rpc.cluster_secret import same
from service.rpc.pool_directory import PoolDirectory
from service.store.api_keys import KeyService
from service.stored_responses.conversation_service import ConversationService
from service.stored_responses.response_service import ResponseService
from service.telemetry.model_server_metrics import ModelServerLoad
from service.types import Tenant

# Puts the config's file in force again, and returns what changed.
Reload = Callable[[], Awaitable[dict[str, list[str]]]]

_MAX_LOGGED_PATH = 200


@dataclass(frozen=True, slots=True)
class GatewayServices:
    """The collaborators of the endpoints, for one config.

    Attributes:
        config: The config that they answer by.
        state: Counters and learned values, which outlive the config.
        admission: Identifies tenants, and reserves what a request may use.
        intake: Reads, checks and parses requests.
        aliases: Finds what aliases stand for.
        alias_traffic: Counts requests by aliases, and rolls targets back.
        planner: Finds the candidates for a request, and what is expected of each.
        executor: Chooses among the candidates and runs the choice.
        sessions: Finds and records the sessions of conversations.
        feedback: Counts votes on replies.
        keys: Stored API keys.
        directory: Links to pools.
        views: Returns the state of every pool.
        remote_failures: Returns for each remote expert why it can't be used, or None.
        remote_load: Returns the load of the remote experts together.
        neighbours: Returns the metrics of the node's other gateways, as texts.
        admin_key: The admin key; without one there are no admin endpoints.
        added: The experts that an admin has added.
        reload: Puts the config's file in force again; None where the gateway doesn't own it.
        batches: Files and batches; None where the service has none.
        batch_planner: Plans batches; None where the service has none.
        responses: Stored responses; None where the service has none.
        conversations: Stored conversations; None where the service has none.
    """

    config: Config
    state: GatewayState
    admission: Admission
    intake: RequestIntake
    aliases: AliasResolution
    alias_traffic: AliasTraffic
    planner: CandidatePlanner
    executor: RecipeExecutor
    sessions: SessionService
    feedback: FeedbackService
    keys: KeyService
    directory: PoolDirectory
    views: Callable[[], list[PoolView]]
    remote_failures: Callable[[], dict[str, str | None]]
    remote_load: Callable[[], ModelServerLoad]
    neighbours: Callable[[], Awaitable[list[str]]]
    admin_key: str | None
    added: AddedExpertService
    reload: Reload | None
    batches: BatchService | None = None
    batch_planner: BatchPlanner | None = None
    responses: ResponseService | None = None
    conversations: ConversationService | None = None

    def keyless(self) -> bool:
        """Whether requests need no key. While the store can't tell, they need one."""
        try:
            return not self.admission.authenticator.needed
        except StoreUnavailableError:
            return False

    def is_operator(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request may see everything: it has the admin key, or no key is needed."""
        return self.keyless() or has_admin_key(headers, self.admin_key)

    def check_operator(self, headers: dict[bytes, bytes], resource: str) -> None:
        """Let only the admin see everybody's traffic, once keys are needed.

        Raises:
            UnauthorizedError: The admin key is needed; the message names `resource`.
            StoreUnavailableError: It is not known yet whether keys are needed.
        """
        if self.admission.authenticator.needed:
            check_admin_key(headers, self.admin_key, resource)


def headers_of(request: Request) -> dict[bytes, bytes]:
    """A request's headers, by name in lower case."""
    return dict(request.scope["headers"])


async def _services(request: Request) -> GatewayServices:
    services: GatewayServices = request.app.state.services
    return services


Services = Annotated[GatewayServices, Depends(_services)]


async def _current_tenant(request: Request, services: Services) -> Tenant:
    return services.admission.identify(headers_of(request))


async def _counted_tenant(request: Request, services: Services) -> Tenant:
    return await services.admission.look_up(headers_of(request))


async def _batches(services: Services) -> BatchService:
    # Without it there are no routes that depend on it.
    assert services.batches is not None
    return services.batches


async def _responses(services: Services) -> ResponseService:
    # Without it there are no routes that depend on it.
    assert services.responses is not None
    return services.responses


async def _conversations(services: Services) -> ConversationService:
    # Without it there are no routes that depend on it.
    assert services.conversations is not None
    return services.conversations


# The tenant behind the request's key.
CurrentTenant = Annotated[Tenant, Depends(_current_tenant)]
# The same, and the request counts against the tenant's limits.
CountedTenant = Annotated[Tenant, Depends(_counted_tenant)]
# The files and batches of the service.
BatchEndpoints = Annotated[BatchService, Depends(_batches)]
# The stored responses of the service.
StoredResponseEndpoints = Annotated[ResponseService, Depends(_responses)]
# The stored conversations of the service.
ConversationEndpoints = Annotated[ConversationService, Depends(_conversations)]


async def json_object(request: Request, services: GatewayServices, most: int) -> dict[str, Any]:
    """Read a body of at most `most` bytes that is a JSON object.

    Raises:
        InvalidRequestError: It is no JSON object, too large, too deep, or has too many values.
    """
    raw = await read_body(
        request.receive,
        most,
        declared=headers_of(request).get(b"content-length", b""),
        timeout_s=services.config.server.limits.body_timeout_s,
    )
    services.intake.check_shape(raw)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return body


def json_response(body: dict[str, Any], status_code: int = 200) -> Response:
    """A reply with a JSON object."""
    return Response(orjson.dumps(body), status_code, media_type="application/json")


def has_admin_key(headers: dict[bytes, bytes], admin_key: str | None) -> bool:
    """Whether a request has the admin key as its Bearer token."""
    given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
    return admin_key is not None and same(given, admin_key.encode())


def check_admin_key(headers: dict[bytes, bytes], admin_key: str | None, resource: str) -> None:
    """Refuse a request without the admin key, and log the refusal.

    Raises:
        UnauthorizedError: The message names `resource`.
    """
    if not has_admin_key(headers, admin_key):
        REFUSALS.refused("admin" if headers.get(b"authorization") else "admin, none", headers)
        raise UnauthorizedError(
            f"the admin key is needed for {resource}: Authorization: Bearer KEY"
        )


class AdminRoute(APIRoute):
    """A route that needs the admin key. The audit log gets a line for each change."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_as_admin(request: Request) -> Response:
            services = await _services(request)
            check_admin_key(headers_of(request), services.admin_key, "the admin endpoints")
            outcome = "cancelled"
            try:
                response = await handle(request)
                outcome = str(response.status_code)
                return response
            except CoeError as error:
                outcome = error.code
                raise
            except Exception as error:
                outcome = type(error).__name__
                raise
            finally:
                if request.method != "GET":
                    path = str(request.scope["path"])[:_MAX_LOGGED_PATH]
                    acted(f"{request.method} {path}", outcome, _audit_details(request))

        return handle_as_admin


def add_audit_details(request: Request, **details: object) -> None:
    """Add details to the request's line in the audit log."""
    request.state.audit = {**_audit_details(request), **details}


def _audit_details(request: Request) -> dict[str, object]:
    details: dict[str, object] = getattr(request.state, "audit", {})
    return details
