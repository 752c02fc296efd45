"""The protocol as plain frozen dataclasses; protobuf types stop at wire.py."""
