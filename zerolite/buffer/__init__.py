"""Memory for what stays, and copies between the host and a device.

Nothing above this package knows streams, events or pinned pages.
"""

from zerolite.buffer.devices import device_memory, link_for, linked
from zerolite.buffer.link import Link, Mark, Reached
from zerolite.buffer.ring import Leaving, Ring
from zerolite.buffer.room import Room, zeros

__all__ = ["Leaving", "Link", "Mark", "Reached", "Ring", "Room", "device_memory", "link_for", "linked", "zeros"]
