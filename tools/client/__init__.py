"""A client whose streams outlive gateways: `from tools.client import StreamClient`."""

from tools.client.stream import Refused, StreamClient, StreamLost

__all__ = ["Refused", "StreamClient", "StreamLost"]
