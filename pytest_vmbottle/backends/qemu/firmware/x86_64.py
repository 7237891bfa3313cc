"""Probe guests for x86-64, in place of a PC's BIOS."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from pytest_vmbottle.backends.qemu.firmware import AMOUNTS, RAM_BYTES, Guests, assemble, image

__all__ = ["COUNT", "WORK", "firmware", "guests"]

_IMAGE = 0x10000
"""Address to which the firmware copies itself. Its code is at the start, its tables from 0x1000."""

# Where every program begins: `_START` is filled up to here with instructions that do nothing (0x90), and runs on into it.
_BODY = 0x100

_START = """
.equ IMAGE, 0x10000
.equ PAGE_TABLES, 0x11000
.equ GDTR, 0x17040
.equ IDTR, 0x17050
.code16
start:
000  b0 52                                movb $'R', %al                 # the first sign of life: real mode
002  e6 e9                                outb %al, $0xe9
004  fc                                   cld
005  b8 00 f0                             movw $0xf000, %ax              # the image is ROM at 0xf0000:
008  8e d8                                movw %ax, %ds
00a  b8 00 10                             movw $IMAGE>>4, %ax
00d  8e c0                                movw %ax, %es
00f  31 f6                                xorw %si, %si
011  31 ff                                xorw %di, %di
013  b9 00 20                             movw $0x2000, %cx              # 32 KiB of it are copied to RAM at 0x10000,
016  66 f3 a5                             rep movsl
019  8e d8                                movw %ax, %ds
01b  ea 20 00 00 10                       ljmp $IMAGE>>4, $ram-start     # and it runs on there
ram:
020  66 0f 01 16 40 70                    lgdtl GDTR-IMAGE
026  66 b8 a0 02 00 00                    movl $0x2a0, %eax              # PAE, PGE, OSFXSR
02c  0f 22 e0                             movl %eax, %cr4
02f  66 b8 00 10 01 00                    movl $PAGE_TABLES, %eax        # page tables
035  0f 22 d8                             movl %eax, %cr3
038  66 b9 80 00 00 c0                    movl $0xc0000080, %ecx         # EFER
03e  0f 32                                rdmsr
040  0d 01 09                             orw $0x901, %ax                # NXE, LME, SCE
043  0f 30                                wrmsr
045  66 b8 33 00 01 80                    movl $0x80010033, %eax         # PG, WP, NE, ET, MP, PE:
04b  0f 22 c0                             movl %eax, %cr0                # straight to long mode
04e  66 ea 56 00 01 00 08 00              ljmpl $0x08, $IMAGE+long-start
.code64
long:
056  b8 10 00 00 00                       movl $0x10, %eax
05b  8e d8                                movl %eax, %ds
05d  8e c0                                movl %eax, %es
05f  8e d0                                movl %eax, %ss
061  bc 00 90 00 00                       movl $0x9000, %esp
066  0f 01 1c 25 50 70 01 00              lidt IDTR
06e  b8 28 00 00 00                       movl $0x28, %eax
073  0f 00 d8                             ltr %ax
076  b0 ff                                movb $0xff, %al                # no interrupts from the old controllers
078  e6 21                                outb %al, $0x21
07a  e6 a1                                outb %al, $0xa1
07c  bd 00 00 e0 fe                       movl $0xfee00000, %ebp         # the local APIC:
081  c7 85 f0 00 00 00 ff 01 00 00        movl $0x1ff, 0xf0(%rbp)        # on
08b  c7 85 e0 03 00 00 0b 00 00 00        movl $0x0b, 0x3e0(%rbp)        # its timer: at full speed,
095  c7 85 20 03 00 00 40 00 00 00        movl $0x40, 0x320(%rbp)        # once, vector 0x40
09f  b0 4c                                movb $'L', %al                 # long mode
0a1  e6 e9                                outb %al, $0xe9
"""

WORK = """
.equ BODY, 0x10100
.equ WINDOW, 0x400000
.equ PAGE_TABLE, 0x14000
.equ RESULTS, 0xb000
.equ LOOPS, 0x17060
.equ BREAKPOINTS, 0x17064
.equ UNDEFINED, 0x17068
.equ TICKS, 0x1706c
.equ IDENTIFICATIONS, 0x17070
.equ FAULTS, 0x17074
.equ WORDS, 0x17078
.equ CALLS, 0x1707c
.code64
work:
000  45 31 e4                             xorl %r12d, %r12d              # r12 counts what has come about
003  8b 0c 25 64 70 01 00                 movl BREAKPOINTS, %ecx
breakpoints:
00a  cc                                   int3                           # on_event
00b  ff c9                                decl %ecx
00d  75 fb                                jnz breakpoints
00f  8b 0c 25 68 70 01 00                 movl UNDEFINED, %ecx
undefined:
016  0f 0b                                ud2                            # on_undefined
018  ff c9                                decl %ecx
01a  75 fa                                jnz undefined
01c  b0 58                                movb $'X', %al                 # exceptions
01e  e6 e9                                outb %al, $0xe9
020  8b 0c 25 6c 70 01 00                 movl TICKS, %ecx
ticks:
027  c7 85 80 03 00 00 40 42 0f 00        movl $1000000, 0x380(%rbp)     # in 1 ms: on_tick
031  fb                                   sti
032  f4                                   hlt
033  fa                                   cli
034  ff c9                                decl %ecx
036  75 ef                                jnz ticks
038  b0 54                                movb $'T', %al                 # timer
03a  e6 e9                                outb %al, $0xe9
03c  44 8b 2c 25 70 70 01 00              movl IDENTIFICATIONS, %r13d
identify:
044  31 c0                                xorl %eax, %eax
046  0f a2                                cpuid
048  b9 80 00 00 c0                       movl $0xc0000080, %ecx         # EFER
04d  0f 32                                rdmsr
04f  0f 30                                wrmsr
051  49 ff c4                             incq %r12
054  41 ff cd                             decl %r13d
057  75 eb                                jnz identify
059  b0 43                                movb $'C', %al                 # CPUID and model-specific registers
05b  e6 e9                                outb %al, $0xe9
05d  8b 0c 25 74 70 01 00                 movl FAULTS, %ecx
faults:
064  48 c7 04 25 00 40 01 00 00 00 00 00  movq $0, PAGE_TABLE            # a page is taken away,
070  0f 20 d8                             movq %cr3, %rax
073  0f 22 d8                             movq %rax, %cr3
076  ff 04 25 00 00 40 00                 incl WINDOW                    # missed (on_page_fault), and given back
07d  ff c9                                decl %ecx
07f  75 e3                                jnz faults
081  8b 04 25 00 00 40 00                 movl WINDOW, %eax
088  49 01 c4                             addq %rax, %r12
08b  b0 50                                movb $'P', %al                 # paging
08d  e6 e9                                outb %al, $0xe9
08f  b8 01 00 00 00                       movl $1, %eax                  # memory: ones,
094  bf 00 00 60 00                       movl $0x600000, %edi
099  8b 0c 25 78 70 01 00                 movl WORDS, %ecx
0a0  f3 48 ab                             rep stosq
0a3  be 00 00 60 00                       movl $0x600000, %esi
0a8  8b 0c 25 78 70 01 00                 movl WORDS, %ecx
sum:
0af  48 ad                                lodsq                          # summed
0b1  49 01 c4                             addq %rax, %r12
0b4  ff c9                                decl %ecx
0b6  75 f7                                jnz sum
0b8  b0 4d                                movb $'M', %al                 # memory
0ba  e6 e9                                outb %al, $0xe9
0bc  b8 01 00 00 00                       movl $1, %eax
0c1  bb 03 00 00 00                       movl $3, %ebx
0c6  8b 0c 25 60 70 01 00                 movl LOOPS, %ecx
power:
0cd  e8 42 00 00 00                       call triple                    # rax = 3 ** loops
0d2  ff c9                                decl %ecx
0d4  75 f7                                jnz power
0d6  49 89 c6                             movq %rax, %r14
0d9  b0 4b                                movb $'K', %al                 # kernel mode
0db  e6 e9                                outb %al, $0xe9
0dd  4c 89 f0                             movq %r14, %rax
0e0  6a 1b                                pushq $0x1b                    # down to user mode: ss,
0e2  68 00 a0 00 00                       pushq $0xa000                  # rsp,
0e7  68 02 02 00 00                       pushq $0x202                   # rflags,
0ec  6a 23                                pushq $0x23                    # cs,
0ee  68 f5 01 01 00                       pushq $BODY+user-work          # rip
0f3  48 cf                                iretq
user:
0f5  8b 0c 25 60 70 01 00                 movl LOOPS, %ecx
more:
0fc  e8 13 00 00 00                       call triple                    # rax = 3 ** (2 * loops)
101  ff c9                                decl %ecx
103  75 f7                                jnz more
105  8b 0c 25 7c 70 01 00                 movl CALLS, %ecx
calls:
10c  cd 80                                int $0x80                      # on_event
10e  ff c9                                decl %ecx
110  75 fa                                jnz calls
112  cd 81                                int $0x81                      # on_end
triple:
114  48 0f af c3                          imulq %rbx, %rax
118  c3                                   ret
on_page_fault:
119  49 ff c4                             incq %r12
11c  48 c7 04 25 00 40 01 00 67 00 20 00  movq $0x200067, PAGE_TABLE
128  48 83 c4 08                          addq $8, %rsp                  # the error code
12c  48 cf                                iretq
on_undefined:
12e  48 83 04 24 02                       addq $2, (%rsp)                # past the instruction
on_event:
133  49 ff c4                             incq %r12
136  48 cf                                iretq
on_tick:
138  49 ff c4                             incq %r12
13b  c7 85 b0 00 00 00 00 00 00 00        movl $0, 0xb0(%rbp)            # end of interrupt
145  48 cf                                iretq
on_end:
147  48 89 04 25 00 b0 00 00              movq %rax, RESULTS
14f  4c 89 24 25 08 b0 00 00              movq %r12, RESULTS+8
157  b0 3d                                movb $'=', %al                 # the results, 16 bytes
159  e6 e9                                outb %al, $0xe9
15b  be 00 b0 00 00                       movl $RESULTS, %esi
160  b9 10 00 00 00                       movl $16, %ecx
165  ba e9 00 00 00                       movl $0xe9, %edx
16a  f3 6e                                rep outsb
16c  b0 21                                movb $0x21, %al                # QEMU's exit status will be 67
16e  e6 f4                                outb %al, $0xf4
170  fa                                   cli                            # since QEMU 9 it runs on for a moment
171  f4                                   hlt
on_surprise:
172  b0 21                                movb $'!', %al
174  e6 e9                                outb %al, $0xe9
176  fa                                   cli
177  f4                                   hlt
"""

COUNT = """
.equ COUNTER, 0xc000
.code64
count:
000  bf 00 00 60 00                       movl $0x600000, %edi           # 1 MiB of words that hold their own address
fill:
005  48 89 3f                             movq %rdi, (%rdi)
008  83 c7 08                             addl $8, %edi
00b  81 ff 00 00 70 00                    cmpl $0x700000, %edi
011  72 f2                                jb fill
013  31 db                                xorl %ebx, %ebx
lap:
015  bf 00 00 60 00                       movl $0x600000, %edi
check:
01a  48 39 3f                             cmpq %rdi, (%rdi)
01d  75 40                                jne on_surprise
01f  83 c7 08                             addl $8, %edi
022  81 ff 00 00 70 00                    cmpl $0x700000, %edi
028  72 f0                                jb check
02a  48 39 1c 25 00 c0 00 00              cmpq %rbx, COUNTER             # the register and RAM must agree
032  75 2b                                jne on_surprise
034  ff c3                                incl %ebx
036  48 89 1c 25 00 c0 00 00              movq %rbx, COUNTER
03e  88 d8                                movb %bl, %al
040  0c 80                                orb $0x80, %al                 # 0x80 + count modulo 128
042  e6 e9                                outb %al, $0xe9
044  c7 85 80 03 00 00 40 42 0f 00        movl $1000000, 0x380(%rbp)     # again in 1 ms
04e  fb                                   sti
04f  f4                                   hlt
050  fa                                   cli
051  eb c2                                jmp lap
on_tick:
053  c7 85 b0 00 00 00 00 00 00 00        movl $0, 0xb0(%rbp)            # end of interrupt
05d  48 cf                                iretq
on_surprise:
05f  b0 21                                movb $'!', %al
061  e6 e9                                outb %al, $0xe9
063  fa                                   cli
064  f4                                   hlt
"""

_STAGES = {
    "R": "real mode",
    "L": "long mode with paging",
    "X": "exceptions",
    "T": "timer interrupts",
    "C": "CPUID and model-specific registers",
    "P": "page faults and changes of page tables",
    "M": "memory",
    "K": "a loop in kernel mode",
    "=": "a loop and system calls in user mode",
}


def guests() -> Guests:
    """Return the guests, which report through the debug port, and end by writing 0x21 to isa-debug-exit."""
    return Guests(
        work=firmware(WORK),
        count=firmware(COUNT),
        devices=("-device", "isa-debugcon,iobase=0xe9,chardev=report", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
        stages=_STAGES,
        hello=b"RL",
        # isa-debug-exit makes the status odd (value * 2 + 1), so that it is never that of a QEMU that ended in order.
        done=2 * 0x21 + 1,
    )


_VECTORS = {3: "on_event", 6: "on_undefined", 14: "on_page_fault", 0x40: "on_tick", 0x80: "on_event", 0x81: "on_end"}
"""Handlers of exceptions and interrupts in a program that has them; all others are surprises."""


def firmware(listing: str) -> bytes:
    """Return the image of a program: common start, program, tables of long mode, and the reset vector at its end."""
    start, body = assemble(_START)[0], assemble(listing)[0]
    parts = {
        0x0: start.ljust(_BODY, b"\x90") + body,
        0x6000: _interrupt_table(assemble(listing)[1]),
        0x7060: struct.pack("<8I", *AMOUNTS.values()),
        # A processor begins 16 bytes below the end of its first 4 GiB, where the image's own end is.
        0xFFF0: bytes.fromhex("ea 00 00 00 f0"),  # ljmp $0xf000, $0
    }
    return image({**parts, **_page_tables(), **_segments()})


def _page_tables() -> Mapping[int, bytes]:
    """Return the page tables, which map the RAM and the local APIC to the same physical addresses.

    The page at 0x400000 is an exception: the program maps it itself.
    """
    present, large, uncached = 0x67, 0x80, 0x10  # present: and dirty, accessed, user, writable
    directory = [megabytes << 20 | present | large for megabytes in range(0, RAM_BYTES >> 20, 2)]
    # A table instead of a page of 2 MiB, since one page of 4 KiB is taken away and given back.
    directory[2] = _IMAGE + 0x4000 | present
    return {
        0x1000: struct.pack("<Q", _IMAGE + 0x2000 | present),
        0x2000: struct.pack("<QQQQ", _IMAGE + 0x3000 | present, 0, 0, _IMAGE + 0x5000 | present),
        0x3000: struct.pack(f"<{len(directory)}Q", *directory),
        # Entry 0x1f7 of the fourth GiB. Devices are not cached.
        0x5FB8: struct.pack("<Q", 0xFEE00000 | present | large | uncached),
    }


def _segments() -> Mapping[int, bytes]:
    tss = _IMAGE + 0x7100
    descriptors = (
        0,
        0x00AF9B000000FFFF,  # 0x08: kernel code
        0x00CF93000000FFFF,  # 0x10: kernel data
        0x00CFF3000000FFFF,  # 0x18: user data
        0x00AFFB000000FFFF,  # 0x20: user code
        0x0000890000000067 | (tss & 0xFFFFFF) << 16,  # 0x28: task state, in two parts
        0,
    )
    return {
        0x7000: struct.pack("<7Q", *descriptors),
        0x7040: struct.pack("<HI", 8 * len(descriptors) - 1, _IMAGE + 0x7000),
        0x7050: struct.pack("<HQ", 0xFFF, _IMAGE + 0x6000),
        0x7104: struct.pack("<Q", 0x9000),  # the stack for what interrupts user mode
    }


def _interrupt_table(labels: Mapping[str, int]) -> bytes:
    handlers = (labels.get(_VECTORS.get(vector, ""), labels["on_surprise"]) for vector in range(256))
    # Gates to kernel code that user mode may call.
    return b"".join(struct.pack("<HHHHQ", _IMAGE + _BODY + handler & 0xFFFF, 0x08, 0xEE00, _IMAGE >> 16, 0) for handler in handlers)
