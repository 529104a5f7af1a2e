# SPDX-License-Identifier: Apache-2.0
#
# A guest in one boot sector, for showing that a migration moved RAM and processor state.
#
# Pass n (n = 1, 2, ...) writes n as a little-endian u32 at the start of each page of
# [start, start + pages * 4096), in ascending order, and then prints "H", a blank, n as eight hex
# digits and a line feed on COM1. After each pass it halts until `pause` timer ticks (55 ms each)
# have gone by; with pause 0 it never halts, and prints at most once a tick.
# No pages make it an idle guest with a heartbeat.
#
# So wherever it is stopped, the counters read n up to some page and n - 1 from there on: a torn,
# lost or stale page shows. And whatever goes on printing must have been given the counter.
#
# It stays in real mode, which leaves the firmware's data alone, and reaches all RAM below 4 GiB
# through fs, whose limit is raised to 4 GiB in a short visit to protected mode. It takes the timer
# interrupt itself, since a firmware handler might reload fs.
#
#   as --32 -I . -o boot.o boot.S && ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o boot.bin boot.o

        .set    COM1, 0x3f8

        .include "flat.inc"

        .code16
        .section .text
        .globl  _start
_start: enter_flat

        movw    $COM1 + 3, %dx          # 8 bits, no parity
        movb    $3, %al
        outb    %al, %dx
        sti

next_pass:
        incl    passes
        movl    passes, %eax
        movl    start, %edi
        movl    pages, %ecx
        testl   %ecx, %ecx
        jz      heartbeat
write:  movl    %eax, %fs:(%edi)
        addl    $4096, %edi
        decl    %ecx
        jnz     write

heartbeat:
        movl    ticks, %eax
        cmpl    printed, %eax
        je      printing_done
        movl    %eax, printed
        movb    $'H', %al
        call    print
        movb    $' ', %al
        call    print
        movl    passes, %ebx
        movw    $8, %si
digit:  roll    $4, %ebx
        movb    %bl, %al
        andb    $15, %al
        addb    $'0', %al
        cmpb    $'9', %al
        jbe     1f
        addb    $'a' - '0' - 10, %al
1:      call    print
        decw    %si
        jnz     digit
        movb    $'\n', %al
        call    print

printing_done:
        movl    ticks, %ebp
rest:   # sti takes effect after the hlt that follows it, so no tick is missed in between
        cli
        movl    ticks, %edx
        subl    %ebp, %edx
        cmpl    pause, %edx
        jae     1f
        sti
        hlt
        jmp     rest
1:      sti
        jmp     next_pass

print:  # al to COM1, when it has room
        pushw   %ax
        movw    $COM1 + 5, %dx
1:      inb     %dx, %al
        testb   $0x20, %al
        jz      1b
        popw    %ax
        movw    $COM1, %dx
        outb    %al, %dx
        ret

on_tick:
        pushw   %ax
        incl    ticks
        end_of_interrupt
        popw    %ax
        iret

        flat_gdt

        # What Python patches in, and reads out of RAM again: guest.py knows these places.
        .org    0x1d0
magic:  .ascii  "RMG1"
start:  .long   0
pages:  .long   0
pause:  .long   2
passes: .long   0
ticks:  .long   0
printed:
        .long   -1                      # no tick yet: the first pass prints too
        .org    510
        .word   0xaa55
