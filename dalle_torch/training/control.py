"""Settings adjusted while a run goes, as its loop uses them.

Owns: from requests to orders. Does not own: the settings (`adjustable`), requests and changes (`requests`), their way
(`mailbox`), their replay (`history`), all of which are to be had here.

Before each update process 0 takes the orders, every process gets them through `engine.gather`, and all apply them:

    own = take_orders(mailbox, history, config, step) if engine.host_index == 0 else Orders()
    orders = Orders.from_json(engine.gather(own.to_json())[0])
    config = apply(config, orders.changes)
    ...
    own.confirm(mailbox, step)        # process 0 alone, when they are applied and recorded
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dalle_torch.config import RunConfig
from dalle_torch.log import get_logger
from dalle_torch.training.adjustable import ADJUSTABLE, WORDS, Adjustable, shown, value_of
from dalle_torch.training.history import History, read_history
from dalle_torch.training.mailbox import Answer, Mailbox
from dalle_torch.training.requests import Change, Request, apply, changes_of, parse_request

__all__ = [
    "ADJUSTABLE",
    "WORDS",
    "Adjustable",
    "Answer",
    "Change",
    "History",
    "Mailbox",
    "Orders",
    "Request",
    "apply",
    "changes_of",
    "parse_request",
    "read_history",
    "shown",
    "take_orders",
    "value_of",
]

logger = get_logger(__name__)


@dataclass
class Orders:
    """What is to be done right before an update.

    Attributes:
        changes: in the order in which they are applied: those that are replayed, then new ones.
        save, stop: a checkpoint is wanted before the update; and then the end.
        requests: those that are to be answered, with their changes; on process 0 alone.
    """

    changes: list[Change] = field(default_factory=list)
    save: bool = False
    stop: bool = False
    requests: list[tuple[Request, list[Change]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.changes or self.save or self.stop)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the other processes; `requests` stay."""
        return {"changes": [change.to_json() for change in self.changes], "save": self.save, "stop": self.stop}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Orders":
        return cls([Change.from_json(change) for change in row["changes"]], row["save"], row["stop"])

    def confirm(self, mailbox: Mailbox, step: int) -> None:
        """Answer the requests, once their changes are in force and in the history."""
        for request, changes in self.requests:
            mailbox.done(request, changes, step)
        self.requests = []


def take_orders(mailbox: Mailbox, history: History, config: RunConfig, step: int) -> Orders:
    """What the history says of this step, and what users asked for since.

    New changes are recorded in `history` (and its file) before they are applied, so that a run that is killed at any
    moment either never made a change or makes it again at this step. A request that was recorded but not answered is
    answered and not made twice; one that does not fit the run any more is answered with the reason.

    Args:
        config: of the run as it is now.
        step: updates that are done; the changes are for the next one.

    Raises:
        ValueError: a change of the history does not fit `config`.
        OSError: the history cannot be written.
    """
    orders = Orders(changes=history.at(step))
    config = apply(config, orders.changes)
    for request in mailbox.pending():
        if history.has(request.id):
            mailbox.done(request, history.of(request.id), step)
            continue
        try:
            changes = changes_of(request, config, step)
        except ValueError as error:
            logger.warning("the request of %s is refused: %s", request.by, error)
            mailbox.done(request, str(error), step)
            continue
        history.record(changes)
        config = apply(config, changes)
        orders.changes += changes
        orders.save |= bool(request.words)
        orders.stop |= "stop" in request.words
        orders.requests.append((request, changes))
    return orders
