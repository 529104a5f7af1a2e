# SPDX-License-Identifier: Apache-2.0
#
# A guest in one boot sector that dirties memory at a pace, for measuring downtime.
#
# Pass n (n = 1, 2, ...) writes n as a little-endian u32 at the start of each page of
# [start, start + pages * 4096), in ascending order, as the guest of the interop tests does, but
# `burst` pages every `interval` cycles of the time stamp counter. It catches up with what it could
# not do in time, unless that is more than `slack` cycles behind. In between it halts until the
# timer ticks, some 250 times a second.
#
# It publishes the counter and the pages written so far, so that whoever reads its memory can tell
# what a second has of cycles and what pace it really keeps; and it takes a new interval at any
# time.
#
# Real mode with a flat fs, and its own timer interrupt: see the guest of the interop tests.
#
#   as --32 -I ../harness/guest -o paced.o paced.S && ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o paced.bin paced.o

        .set    PIT0, 0x40
        .set    PIT_MODE, 0x43
        .set    TICK, 4773              # of the timer's 1193182 Hz

        # Variables: not in the code's page, where each write would be looked at as new code.
        .set    next, 0x9000            # 64 bits: the cycle that the next burst is due at
        .set    now, 0x9008             # 64 bits: the cycle it was a moment ago
        .set    written, 0x9010         # 64 bits: pages
        .set    pass, 0x9018
        .set    page, 0x901c            # where the next burst begins
        .set    interval, 0x9020

        .include "flat.inc"

        .code16
        .section .text
        .globl  _start
_start: enter_flat
        movb    $0x34, %al              # counter 0, both bytes, periodically
        outb    %al, $PIT_MODE
        movb    $TICK & 0xff, %al
        outb    %al, $PIT0
        movb    $TICK >> 8, %al
        outb    %al, $PIT0

        xorl    %eax, %eax
        movl    %eax, next
        movl    %eax, next + 4
        movl    %eax, written
        movl    %eax, written + 4
        incl    %eax
        movl    %eax, pass
        movl    start, %edi
        movl    %edi, page
        movl    first_interval, %eax
        movl    %eax, interval

turn:   rdtsc
        movl    %eax, now
        movl    %edx, now + 4
        subl    next, %eax
        sbbl    next + 4, %edx
        js      rest
        testl   %edx, %edx
        jnz     late
        cmpl    slack, %eax
        jbe     due
late:   movl    now, %eax
        movl    %eax, next
        movl    now + 4, %eax
        movl    %eax, next + 4
due:    movl    interval, %eax
        addl    %eax, next
        adcl    $0, next + 4

        movl    page, %edi
        movl    pass, %eax
        movl    burst, %ecx
        addl    %ecx, written
        adcl    $0, written + 4
write:  movl    %eax, %fs:(%edi)
        addl    $4096, %edi
        decl    %ecx
        jnz     write
        cmpl    end, %edi
        jb      1f
        movl    start, %edi
        incl    pass
1:      movl    %edi, page
        jmp     turn

rest:   sti
        hlt
        cli
        jmp     turn

on_tick:
        pushw   %ax
        end_of_interrupt
        popw    %ax
        iret

        flat_gdt

        # What Python patches in: live_qemu.py knows these places.
        .org    0x1d0
magic:  .ascii  "RMP1"
start:  .long   0
end:    .long   0
burst:  .long   1
slack:  .long   0
first_interval:
        .long   0
        .org    510
        .word   0xaa55
