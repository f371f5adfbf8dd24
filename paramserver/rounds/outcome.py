"""What follows from an event, as `Rounds` and its parts find it out."""

from __future__ import annotations

from paramserver.protocol.messages import Message
from paramserver.rounds.effects import Effect, Say, Send
from paramserver.rounds.roster import Peer
from paramserver.rounds.sentences import Sentences


class Outcome:
    """Collects the effects of an event in their order, and limits the sentences about each worker
    (`Sentences`)."""

    def __init__(self) -> None:
        self.effects: list[Effect] = []
        self.sentences = Sentences()

    def take(self) -> list[Effect]:
        """The effects since the last call."""
        effects, self.effects = self.effects, []
        return effects

    def send(self, peer: Peer, message: Message) -> None:
        """Send a message to one peer."""
        self.effects.append(Send(peer.session, message))

    def say(
        self,
        text: str,
        about: Peer | None = None,
        *,
        warning: bool = False,
        problem: bool = False,
    ) -> None:
        """Log a sentence for people, unless there were too many about this worker."""
        if about is None or about.id == 0 or self.sentences.may(about.id, about.name):
            self.effects.append(Say(text, warning=warning, problem=problem))

    def warn(self, text: str, about: Peer | None = None) -> None:
        """The same, as a warning."""
        self.say(text, about, warning=True)
