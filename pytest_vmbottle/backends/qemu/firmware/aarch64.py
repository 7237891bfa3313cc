"""Probe guests for aarch64, in the flash memory of QEMU's board `virt`.

They turn paging and caches on before they write anything: on real processors a write that bypasses the caches may be lost to a stale line.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from pytest_vmbottle.backends.qemu.firmware import AMOUNTS, RAM_BYTES, Guests, assemble, image

__all__ = ["COUNT", "START", "WORK", "firmware", "guests"]

_RAM, _BLOCK = 0x40000000, 2 << 20

_IMAGE = _RAM + 0x200000
"""Address to which the firmware copies itself, behind the board's device tree. Its code is at the start, its tables from 0x2000."""

START = """
.equ RAM, 0x40200000
.equ TABLES, 0x3000
start:
000  1a 20 a1 d2  movz x26, #0x0900, lsl #16        // the serial port:
004  20 60 80 52  mov w0, #0x301
008  40 33 00 b9  str w0, [x26, #0x30]              // on
00c  c0 08 80 52  mov w0, #'F'                      // the first sign of life: code in flash memory, at 0
010  40 03 00 39  strb w0, [x26]
014  e0 9f 80 d2  mov x0, #0x4ff                    // memory is cached (0), devices are not (1)
018  00 a2 18 d5  msr mair_el1, x0
01c  00 a4 86 d2  movz x0, #0x3520                  // 4 GiB in pages of 4 KiB, tables are cached
020  00 10 a0 f2  movk x0, #0x80, lsl #16
024  40 20 18 d5  msr tcr_el1, x0
028  00 00 86 d2  mov x0, #TABLES
02c  00 20 18 d5  msr ttbr0_el1, x0
030  1f 87 08 d5  tlbi vmalle1
034  9f 37 03 d5  dsb nsh
038  df 3f 03 d5  isb
03c  a0 01 83 d2  movz x0, #0x180d                  // caches and paging are on before anything is written:
040  00 1a a6 f2  movk x0, #0x30d0, lsl #16         // what bypasses caches may be lost to their stale lines
044  00 10 18 d5  msr sctlr_el1, x0
048  df 3f 03 d5  isb
04c  19 04 a8 d2  movz x25, #RAM>>16, lsl #16
050  00 00 80 d2  mov x0, #0
054  e1 03 19 aa  mov x1, x25
copy:
058  02 84 40 f8  ldr x2, [x0], #8                  // 64 KiB are copied to RAM
05c  22 00 00 f9  str x2, [x1]
060  21 7b 0b d5  dc cvau, x1
064  21 20 00 91  add x1, x1, #8
068  1f 40 40 f1  cmp x0, #0x10000
06c  61 ff ff 54  b.ne copy
070  9f 3b 03 d5  dsb ish
074  1f 75 08 d5  ic iallu                          // so that they can be run
078  9f 3b 03 d5  dsb ish
07c  df 3f 03 d5  isb
080  20 0b 40 91  add x0, x25, #0x2000
084  00 c0 18 d5  msr vbar_el1, x0
088  18 00 a1 d2  movz x24, #0x0800, lsl #16        // the interrupt controller:
08c  00 04 38 d5  mrs x0, id_aa64pfr0_el1
090  00 6c 58 d3  ubfx x0, x0, #24, #4
094  80 02 00 b4  cbz x0, version2
098  40 02 80 52  mov w0, #0x12
09c  00 03 00 b9  str w0, [x24]                     // version 3, on;
0a0  41 01 a1 d2  movz x1, #0x080a, lsl #16
0a4  3f 14 00 b9  str wzr, [x1, #0x14]              // this processor's part is woken
waking:
0a8  20 14 40 b9  ldr w0, [x1, #0x14]
0ac  e0 ff 17 37  tbnz w0, #2, waking
0b0  61 01 a1 d2  movz x1, #0x080b, lsl #16
0b4  00 00 80 12  mov w0, #-1
0b8  20 80 00 b9  str w0, [x1, #0x80]               // all are of the group that is on
0bc  00 00 a1 52  mov w0, #0x8000000
0c0  20 00 01 b9  str w0, [x1, #0x100]              // 27: the virtual timer
0c4  20 00 80 d2  mov x0, #1
0c8  a0 cc 18 d5  msr icc_sre_el1, x0
0cc  df 3f 03 d5  isb
0d0  e0 cc 18 d5  msr icc_igrpen1_el1, x0
0d4  e0 1f 80 d2  mov x0, #0xff
0d8  00 46 18 d5  msr icc_pmr_el1, x0
0dc  1b 00 80 d2  mov x27, #0                       // it is spoken to by system registers
0e0  0a 00 00 14  b ready
version2:
0e4  20 00 80 52  mov w0, #1
0e8  00 03 00 b9  str w0, [x24]
0ec  00 00 a1 52  mov w0, #0x8000000
0f0  00 03 01 b9  str w0, [x24, #0x100]
0f4  3b 00 a1 d2  movz x27, #0x0801, lsl #16        // it is spoken to here
0f8  e0 1f 80 52  mov w0, #0xff
0fc  60 07 00 b9  str w0, [x27, #4]
100  20 00 80 52  mov w0, #1
104  60 03 00 b9  str w0, [x27]
ready:
108  c0 0a 80 52  mov w0, #'V'                      // virtual memory
10c  40 03 00 39  strb w0, [x26]
110  1c 00 80 d2  mov x28, #0                       // x28 counts what has come about
114  00 05 00 10  adr x0, program
118  00 00 19 8b  add x0, x0, x25
11c  00 00 1f d6  br x0                             // and it runs on there
pause:
120  fd 03 1c aa  mov x29, x28
124  00 e0 3b d5  mrs x0, cntfrq_el0
128  01 7d 80 d2  mov x1, #1000
12c  00 08 c1 9a  udiv x0, x0, x1
130  00 e3 1b d5  msr cntv_tval_el0, x0             // in 1 ms: on_interrupt
134  20 00 80 d2  mov x0, #1
138  20 e3 1b d5  msr cntv_ctl_el0, x0
13c  df 3f 03 d5  isb
waiting:
140  7f 20 03 d5  wfi
144  ff 42 03 d5  msr daifclr, #2
148  df 3f 03 d5  isb
14c  df 42 03 d5  msr daifset, #2
150  bf 03 1c eb  cmp x29, x28                      // it may wake for nothing
154  60 ff ff 54  b.eq waiting
158  c0 03 5f d6  ret
on_interrupt:
15c  7b 00 00 b4  cbz x27, by_register
160  60 0f 40 b9  ldr w0, [x27, #0xc]
164  02 00 00 14  b acknowledged
by_register:
168  00 cc 38 d5  mrs x0, icc_iar1_el1
acknowledged:
16c  1f fc 0f 71  cmp w0, #1023                     // gone before it was looked at
170  80 01 00 54  b.eq dismissed
174  1f 6c 00 71  cmp w0, #27
178  61 01 00 54  b.ne on_surprise
17c  21 e3 3b d5  mrs x1, cntv_ctl_el0
180  3f e3 1b d5  msr cntv_ctl_el0, xzr
184  df 3f 03 d5  isb
188  21 08 42 d3  ubfx x1, x1, #2, #1               // 1 if its time had come
18c  9c 03 01 8b  add x28, x28, x1
190  7b 00 00 b4  cbz x27, end_by_register
194  60 13 00 b9  str w0, [x27, #0x10]              // end of interrupt
198  e0 03 9f d6  eret
end_by_register:
19c  20 cc 18 d5  msr icc_eoir1_el1, x0
dismissed:
1a0  e0 03 9f d6  eret
on_surprise:
1a4  20 04 80 52  mov w0, #'!'
1a8  40 03 00 39  strb w0, [x26]
over:
1ac  7f 20 03 d5  wfi
1b0  ff ff ff 17  b over
"""
WORK = """
.equ LOOPS, 0
.equ BREAKPOINTS, 4
.equ UNDEFINED, 8
.equ TICKS, 12
.equ IDENTIFICATIONS, 16
.equ FAULTS, 20
.equ WORDS, 24
.equ CALLS, 28
program:
1b4  37 0b 40 91  add x23, x25, #0x2000
1b8  f7 02 20 91  add x23, x23, #0x800              // the amounts
1bc  f4 06 40 b9  ldr w20, [x23, #BREAKPOINTS]
breakpoints:
1c0  00 00 20 d4  brk #0                            // on_exception
1c4  94 06 00 71  subs w20, w20, #1
1c8  c1 ff ff 54  b.ne breakpoints
1cc  f4 0a 40 b9  ldr w20, [x23, #UNDEFINED]
undefined:
1d0  00 00 00 00  udf #0                            // on_exception
1d4  94 06 00 71  subs w20, w20, #1
1d8  c1 ff ff 54  b.ne undefined
1dc  00 0b 80 52  mov w0, #'X'                      // exceptions
1e0  40 03 00 39  strb w0, [x26]
1e4  f4 0e 40 b9  ldr w20, [x23, #TICKS]
ticks:
1e8  ce ff ff 97  bl pause
1ec  94 06 00 71  subs w20, w20, #1
1f0  c1 ff ff 54  b.ne ticks
1f4  80 0a 80 52  mov w0, #'T'                      // timer
1f8  40 03 00 39  strb w0, [x26]
1fc  f4 12 40 b9  ldr w20, [x23, #IDENTIFICATIONS]
identify:
200  00 00 38 d5  mrs x0, midr_el1
204  00 04 38 d5  mrs x0, id_aa64pfr0_el1
208  00 06 38 d5  mrs x0, id_aa64isar0_el1
20c  00 07 38 d5  mrs x0, id_aa64mmfr0_el1
210  40 20 38 d5  mrs x0, tcr_el1
214  40 20 18 d5  msr tcr_el1, x0
218  df 3f 03 d5  isb
21c  9c 07 00 91  add x28, x28, #1
220  94 06 00 71  subs w20, w20, #1
224  e1 fe ff 54  b.ne identify
228  60 0a 80 52  mov w0, #'S'                      // system registers
22c  40 03 00 39  strb w0, [x26]
230  f4 16 40 b9  ldr w20, [x23, #FAULTS]
234  16 08 a8 d2  movz x22, #0x4040, lsl #16        // a window on a page, by way of
238  38 1b 40 91  add x24, x25, #0x6000             // a table of its own
faults:
23c  1f 03 00 f9  str xzr, [x24]                    // the page is taken away,
240  9f 3b 03 d5  dsb ish
244  c0 fe 4c d3  lsr x0, x22, #12
248  20 87 08 d5  tlbi vae1, x0
24c  9f 3b 03 d5  dsb ish
250  df 3f 03 d5  isb
254  d5 02 40 b9  ldr w21, [x22]                    // missed (on_exception), and given back
258  b5 06 00 11  add w21, w21, #1
25c  d5 02 00 b9  str w21, [x22]
260  94 06 00 71  subs w20, w20, #1
264  c1 fe ff 54  b.ne faults
268  9c 03 15 8b  add x28, x28, x21
26c  00 0a 80 52  mov w0, #'P'                      // paging
270  40 03 00 39  strb w0, [x26]
274  20 00 80 d2  mov x0, #1                        // memory: ones,
278  01 0c a8 d2  movz x1, #0x4060, lsl #16
27c  f4 1a 40 b9  ldr w20, [x23, #WORDS]
fill:
280  20 84 00 f8  str x0, [x1], #8
284  94 06 00 71  subs w20, w20, #1
288  c1 ff ff 54  b.ne fill
28c  01 0c a8 d2  movz x1, #0x4060, lsl #16
290  f4 1a 40 b9  ldr w20, [x23, #WORDS]
sum:
294  20 84 40 f8  ldr x0, [x1], #8                  // summed
298  9c 03 00 8b  add x28, x28, x0
29c  94 06 00 71  subs w20, w20, #1
2a0  a1 ff ff 54  b.ne sum
2a4  a0 09 80 52  mov w0, #'M'                      // memory
2a8  40 03 00 39  strb w0, [x26]
2ac  22 00 80 d2  mov x2, #1
2b0  63 00 80 d2  mov x3, #3
2b4  f4 02 40 b9  ldr w20, [x23, #LOOPS]
power:
2b8  12 00 00 94  bl triple                         // x2 = 3 ** loops
2bc  94 06 00 71  subs w20, w20, #1
2c0  c1 ff ff 54  b.ne power
2c4  60 09 80 52  mov w0, #'K'                      // kernel mode
2c8  40 03 00 39  strb w0, [x26]
2cc  f4 02 40 b9  ldr w20, [x23, #LOOPS]
2d0  f5 1e 40 b9  ldr w21, [x23, #CALLS]
2d4  80 00 00 10  adr x0, user
2d8  20 40 18 d5  msr elr_el1, x0
2dc  1f 40 18 d5  msr spsr_el1, xzr                 // down to user mode
2e0  e0 03 9f d6  eret
user:
2e4  07 00 00 94  bl triple                         // x2 = 3 ** (2 * loops)
2e8  94 06 00 71  subs w20, w20, #1
2ec  c1 ff ff 54  b.ne user
calls:
2f0  01 00 00 d4  svc #0                            // on_call
2f4  b5 06 00 71  subs w21, w21, #1
2f8  c1 ff ff 54  b.ne calls
2fc  21 00 00 d4  svc #1
triple:
300  42 7c 03 9b  mul x2, x2, x3
304  c0 03 5f d6  ret
on_exception:
308  00 52 38 d5  mrs x0, esr_el1
30c  00 fc 5a d3  lsr x0, x0, #26
310  e0 01 00 b4  cbz x0, on_undefined
314  1f f0 00 f1  cmp x0, #0x3c                     // a breakpoint,
318  a0 01 00 54  b.eq on_undefined
31c  1f 94 00 f1  cmp x0, #0x25                     // or a page is missing
320  21 f4 ff 54  b.ne on_surprise
324  00 60 38 d5  mrs x0, far_el1
328  1f 00 16 eb  cmp x0, x22
32c  c1 f3 ff 54  b.ne on_surprise
330  00 06 a8 d2  movz x0, #0x4030, lsl #16
334  00 0c 1c 91  add x0, x0, #0x703
338  00 03 00 f9  str x0, [x24]
33c  9f 3b 03 d5  dsb ish
340  df 3f 03 d5  isb
344  9c 07 00 91  add x28, x28, #1
348  e0 03 9f d6  eret
on_undefined:
34c  20 40 38 d5  mrs x0, elr_el1
350  00 10 00 91  add x0, x0, #4                    // past the instruction
354  20 40 18 d5  msr elr_el1, x0
358  9c 07 00 91  add x28, x28, #1
35c  e0 03 9f d6  eret
on_call:
360  00 52 38 d5  mrs x0, esr_el1
364  01 fc 5a d3  lsr x1, x0, #26
368  3f 54 00 f1  cmp x1, #0x15
36c  c1 f1 ff 54  b.ne on_surprise
370  60 00 00 37  tbnz x0, #0, on_end
374  9c 07 00 91  add x28, x28, #1
378  e0 03 9f d6  eret
on_end:
37c  21 1f 40 91  add x1, x25, #0x7000
380  22 70 00 a9  stp x2, x28, [x1]
384  a0 07 80 52  mov w0, #'='                      // the results, 16 bytes
388  40 03 00 39  strb w0, [x26]
38c  14 02 80 52  mov w20, #16
results:
390  20 14 40 38  ldrb w0, [x1], #1
394  40 03 00 39  strb w0, [x26]
398  94 06 00 71  subs w20, w20, #1
39c  a1 ff ff 54  b.ne results
3a0  00 80 b0 52  movz w0, #0x8400, lsl #16         // PSCI:
3a4  00 20 00 11  add w0, w0, #8                    // SYSTEM_OFF
3a8  02 00 00 d4  hvc #0
3ac  80 ff ff 17  b over                            // QEMU 10 ends a moment later than it is told to
"""
COUNT = """
program:
1b4  16 0c a8 d2  movz x22, #0x4060, lsl #16        // 1 MiB of words that hold their own address
1b8  d7 02 44 91  add x23, x22, #0x100000
1bc  38 1f 40 91  add x24, x25, #0x7000             // the counter
1c0  e0 03 16 aa  mov x0, x22
fill:
1c4  00 00 00 f9  str x0, [x0]
1c8  00 20 00 91  add x0, x0, #8
1cc  1f 00 17 eb  cmp x0, x23
1d0  a1 ff ff 54  b.ne fill
1d4  14 00 80 d2  mov x20, #0
lap:
1d8  e0 03 16 aa  mov x0, x22
check:
1dc  01 00 40 f9  ldr x1, [x0]
1e0  3f 00 00 eb  cmp x1, x0
1e4  01 fe ff 54  b.ne on_surprise
1e8  00 20 00 91  add x0, x0, #8
1ec  1f 00 17 eb  cmp x0, x23
1f0  61 ff ff 54  b.ne check
1f4  01 03 40 f9  ldr x1, [x24]                     // the register and RAM must agree
1f8  3f 00 14 eb  cmp x1, x20
1fc  41 fd ff 54  b.ne on_surprise
200  94 06 00 91  add x20, x20, #1
204  14 03 00 f9  str x20, [x24]
208  80 02 19 32  orr w0, w20, #0x80                // 0x80 + count modulo 128
20c  40 03 00 39  strb w0, [x26]
210  c4 ff ff 97  bl pause
214  f1 ff ff 17  b lap
on_exception:
on_call:
218  e3 ff ff 17  b on_surprise
"""

_STAGES = {
    "F": "code in flash memory",
    "V": "paging with caches, code in RAM",
    "X": "exceptions",
    "T": "timer interrupts",
    "S": "system registers",
    "P": "page faults and changes of page tables",
    "M": "memory",
    "K": "a loop in kernel mode",
    "=": "a loop and system calls in user mode",
}


def guests() -> Guests:
    """Return the guests, which report through the serial port, and end by PSCI."""
    return Guests(
        work=firmware(WORK),
        count=firmware(COUNT),
        devices=("-serial", "chardev:report"),
        stages=_STAGES,
        hello=b"FV",
        done=0,
    )


def firmware(listing: str) -> bytes:
    """Return the image of a program: the common start, which flows into it, and the tables of both."""
    code, labels = assemble(START + listing)
    parts = {0x0: code, 0x2000: _vectors(labels), 0x2800: struct.pack("<8I", *AMOUNTS.values())}
    return image({**parts, **_page_tables()})


_VECTORS = {4: "on_exception", 5: "on_interrupt", 8: "on_call", 9: "on_interrupt"}
"""Handlers by vector: 4 and 5 are for kernel mode, 8 and 9 for user mode; all others are surprises."""


def _vectors(labels: Mapping[str, int]) -> bytes:
    """Return the vector table: 16 entries of 128 bytes, with a branch in each."""
    handlers = [labels[_VECTORS.get(vector, "on_surprise")] for vector in range(16)]
    # Relative to the branch itself, so that the table is right in flash memory and in RAM.
    distances = [handler - (0x2000 + 0x80 * vector) for vector, handler in enumerate(handlers)]
    # The instruction `b`: its lower 26 bits are the distance in words.
    return b"".join(struct.pack("<I124x", 0x14000000 | distance >> 2 & 0x3FFFFFF) for distance in distances)


def _page_tables() -> Mapping[int, bytes]:
    """Return the page tables, which map virtual addresses to the same physical ones.

    Those of the third block of RAM are an exception: its table is in RAM, for the program to fill.

    User mode may execute memory, but not read it.
    """
    table, block = 0x3, 0x1
    normal, readonly = block | 0x700, 0x80  # accessed, shareable, cached
    device = block | 3 << 53 | 0x404  # accessed, never executed
    # Addresses from the memory map in QEMU's hw/arm/virt.c.
    low = {0x00000000: normal | readonly, 0x08000000: device, 0x09000000: device}  # flash memory, interrupt controller, serial port
    ram = [address | normal for address in range(_RAM, _RAM + RAM_BYTES, _BLOCK)]
    # A table instead of a block of 2 MiB, so that the program can take away and give back a single page.
    ram[2] = _IMAGE + 0x6000 | table
    return {
        0x3000: struct.pack("<QQ", 0x4000 | table, 0x5000 | table),
        **{0x4000 + 8 * (address // _BLOCK): struct.pack("<Q", address | attributes) for address, attributes in low.items()},
        0x5000: struct.pack(f"<{len(ram)}Q", *ram),
    }
