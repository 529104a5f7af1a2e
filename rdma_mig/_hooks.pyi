# SPDX-License-Identifier: Apache-2.0
from rdma_mig.channel.qemufile import BytesSent, QEMUFile

class PageTaker:
    def offer(self, block_offset: int, offset: int, size: int) -> None: ...

def ram_control_save_page(
    f: QEMUFile, block_offset: int, offset: int, size: int, bytes_sent: BytesSent | None = None
) -> int: ...
