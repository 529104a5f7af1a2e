# SPDX-License-Identifier: Apache-2.0
"""A migration engine: any guest, over any transport that is installed, in both roles."""

from importlib.metadata import entry_points
from threading import Event

from rdma_mig import plugin as rm

SECTION = 2
END_OF_PHASE = rm.encode_eos() + rm.encode_footer(SECTION)
FEW_PAGES, MOST_ROUNDS = 64, 20


def send(guest, uri, migration, **options):
    """Begin to send a guest; it runs on until little is left to send."""
    save = Source(guest).save
    find(uri).start_outgoing(uri, migration=migration, ram=guest.ram, save=save, **options)


def receive(guest, uri, migration, **options):
    """Begin to wait for a guest, and return the URI that its source can connect to."""
    load = Destination(guest).load
    return find(uri).start_incoming(uri, migration=migration, process=load, **options)


def find(uri):
    """Return the transport of a URI, whoever has installed it."""
    (entry,) = entry_points(group="rdma_mig.transports", name=uri.partition(":")[0])
    transport = entry.load()
    if transport.api_version != rm.API_VERSION:
        raise rm.UsageError(f"{entry.value} is for version {transport.api_version}")
    return transport()


class Source:
    def __init__(self, guest):
        self.guest = guest
        self.writer = rm.PageWriter(guest.ram)
        self.dirty = [rm.DirtyBitmap.of_length(length) for length in guest.ram.lengths]
        self.stopped, self.let_go = Event(), Event()

    def save(self, migration, file, transport):
        try:
            with rm.Tracking(self.guest) as tracking:
                self.describe(file, transport)
                for pages in self.dirty:
                    pages.fill()
                for _ in range(MOST_ROUNDS):
                    self.phase(file, rm.encode_section_part(SECTION), rm.RAM_CONTROL_ROUND)
                    if tracking.harvest(self.dirty) < FEW_PAGES:
                        break
                self.stopped.set()
                self.guest.stop()
                tracking.harvest(self.dirty, at_rest=True)
                self.phase(file, rm.encode_section_end(SECTION), rm.RAM_CONTROL_FINISH)
            state, here = self.guest.save_device_state(), "the guest goes on running here"
            rm.hand_over(migration, file, transport, state, owner=here, before_eof=self.let_go.set)
            transport.finish()
        except BaseException as error:
            nobody_has_it = not self.let_go.is_set() or isinstance(error, rm.DestinationRefused)
            if self.stopped.is_set() and nobody_has_it:
                self.guest.resume()
            raise

    def describe(self, file, transport):
        blocks = [rm.StreamBlock(b.block.idstr, b.block.length) for b in self.guest.ram]
        file.put(rm.encode_head(self.guest.machine))
        if transport.has_return_path:
            file.put(rm.encode_command(rm.CommandType.OPEN_RETURN_PATH))
            file.put(rm.encode_command(rm.CommandType.PING, bytes([0, 0, 0, rm.RETURN_PATH_PING])))
        file.put(rm.encode_ram_start(SECTION, blocks))
        rm.ram_control_before_iterate(file, rm.RAM_CONTROL_SETUP)
        rm.ram_control_after_iterate(file, rm.RAM_CONTROL_SETUP)
        file.put(END_OF_PHASE)

    def phase(self, file, section, flags):
        file.put(section)
        rm.ram_control_before_iterate(file, flags)
        for block, pages in zip(self.guest.ram, self.dirty, strict=True):
            done = rm.ram_control_save_pages(file, block.offset, pages)
            if done == rm.RAM_SAVE_CONTROL_NOT_SUPP:  # else DELAYED: the transport has them
                for piece in self.writer.pieces(block.index, pages):
                    file.put(piece)
            pages.fill(False)
        rm.ram_control_after_iterate(file, flags)
        file.put(END_OF_PHASE)


class Destination:
    def __init__(self, guest):
        self.guest = guest

    def load(self, migration, file, transport):
        # What carries no hooks brings RAM in the stream.
        parser = rm.StreamParser(None if file.hooks else lambda _: rm.PageReader(self.guest.ram))
        for event in rm.read_events(file, parser, transport):
            match event:
                case rm.StreamHead():
                    head = event
                case rm.RamStart():
                    ram = self.guest.prepare(head, event)
                    for block in ram:
                        rm.ram_control_load_hook(file, rm.RAM_CONTROL_BLOCK_REG, block.block.idstr)
                    transport.attach(ram)
                case rm.Hook():
                    rm.ram_control_load_hook(file, rm.RAM_CONTROL_HOOK)
        rm.take_over(migration, file, transport, parser, self.guest.load_device_state)
        self.guest.resume()
