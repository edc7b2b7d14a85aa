//! The code that is run inside other processes. It is position independent, uses no stack and touches no
//! vector register, so that nothing but general registers has to be put back.

use std::arch::global_asm;

// One table of calls: r15 walks it, r14 is its end. Each record is {nr, args[6], flags}; the result replaces
// nr. Flag bits 0-5: the argument is the address of a word to load. Bit 6: stop when the call fails.
global_asm!(
    ".macro torpor_run_table",
    "2: cmp r15, r14",
    "   jae 3f",
    "   mov r13, [r15 + 56]",
    "   mov rax, [r15]",
    "   mov rdi, [r15 + 8]",
    "   test r13b, 1",
    "   jz 4f",
    "   mov rdi, [rdi]",
    "4: mov rsi, [r15 + 16]",
    "   test r13b, 2",
    "   jz 4f",
    "   mov rsi, [rsi]",
    "4: mov rdx, [r15 + 24]",
    "   test r13b, 4",
    "   jz 4f",
    "   mov rdx, [rdx]",
    "4: mov r10, [r15 + 32]",
    "   test r13b, 8",
    "   jz 4f",
    "   mov r10, [r10]",
    "4: mov r8, [r15 + 40]",
    "   test r13b, 16",
    "   jz 4f",
    "   mov r8, [r8]",
    "4: mov r9, [r15 + 48]",
    "   test r13b, 32",
    "   jz 4f",
    "   mov r9, [r9]",
    "4: syscall",
    "   mov [r15], rax",
    "   add r15, 64",
    "   cmp rax, -4095",
    "   jb 2b",
    "   test r13b, 64",
    "   jz 2b",
    "3:",
    ".endm",
    // A task that catches its own system calls (prctl(2), PR_SET_SYSCALL_USER_DISPATCH) does not while the byte that it
    // names is 0. So it is set by the code itself, before each of its calls: nobody need be there to put it back.
    ".macro torpor_let_pass",
    "   mov r13, [rip + 6f + 192]",
    "   test r13, r13",
    "   jz 9f",
    "   mov byte ptr [r13], 0",
    "9:",
    ".endm",
    // In a process that is being built: run the table, then trap to the tracer. Such a process carries
    // PTRACE_O_EXITKILL, so it never runs on without its tracer.
    ".pushsection .rodata",
    ".globl torpor_site_start, torpor_site_end",
    "torpor_site_start:",
    "   torpor_run_table",
    "   int3",
    "torpor_site_end:",
    // In a living task: run the table (or one call with the registers as they are), send the marker signal
    // that the tracer sees and nobody else, and, when there is no tracer any more, put everything back:
    // unmap the table, then flags, mask and registers, and jump to where the task was.
    //
    // The fork entry makes a twin of the process. The twin never gets past this: its tracer holds it or, when that
    // is gone, it ends. r12 is the twin's pid then, and 0 otherwise: on the way home without a tracer it is
    // waited for.
    ".globl torpor_visit_start, torpor_visit_call, torpor_visit_fork, torpor_visit_marked, torpor_visit_pool",
    ".globl torpor_visit_end",
    "torpor_visit_start:",
    "   torpor_let_pass",
    "   torpor_run_table",
    "   jmp 5f",
    "torpor_visit_fork:",
    "   torpor_let_pass",
    "   syscall",
    "   mov rbx, rax",
    "   mov r12, rax",
    "   test rax, rax",
    "   jnz 5f",
    "   mov eax, 231", // exit_group
    "   mov edi, 0",
    "   syscall",
    "torpor_visit_call:",
    "   torpor_let_pass",
    "   syscall",
    "   mov rbx, rax",
    "5: mov eax, 234", // tgkill
    "   mov edi, [rip + 6f + 0]",
    "   mov esi, [rip + 6f + 8]",
    "   mov edx, [rip + 6f + 16]",
    "   syscall",
    "torpor_visit_marked:",
    "   torpor_let_pass",
    "   test r12, r12",
    "   jle 7f",
    "   mov eax, 61", // wait4
    "   mov rdi, r12",
    "   mov esi, 0",
    "   mov edx, 0x80000000", // __WCLONE
    "   mov r10d, 0",
    "   syscall",
    "7: mov eax, 11", // munmap
    "   mov rdi, [rip + 6f + 24]",
    "   mov rsi, [rip + 6f + 32]",
    "   syscall",
    // Flags are restored while signals are still blocked, since it borrows the stack pointer. From here on
    // only instructions that keep the flags.
    "   lea rsp, [rip + 6f + 40]",
    "   popfq",
    "   mov rsp, [rip + 6f + 48]",
    "   mov eax, 14", // rt_sigprocmask
    "   mov edi, 2",  // SIG_SETMASK
    "   lea rsi, [rip + 6f + 56]",
    "   mov edx, 0",
    "   mov r10d, 8",
    "   syscall",
    "   mov rcx, [rip + 6f + 192]",
    "   jrcxz 8f",
    "   mov rax, [rip + 6f + 200]",
    "   mov [rcx], al",
    "8: mov rax, [rip + 6f + 64]",
    "   mov rbx, [rip + 6f + 72]",
    "   mov rcx, [rip + 6f + 80]",
    "   mov rdx, [rip + 6f + 88]",
    "   mov rsi, [rip + 6f + 96]",
    "   mov rdi, [rip + 6f + 104]",
    "   mov rbp, [rip + 6f + 112]",
    "   mov r8, [rip + 6f + 120]",
    "   mov r9, [rip + 6f + 128]",
    "   mov r10, [rip + 6f + 136]",
    "   mov r11, [rip + 6f + 144]",
    "   mov r12, [rip + 6f + 152]",
    "   mov r13, [rip + 6f + 160]",
    "   mov r14, [rip + 6f + 168]",
    "   mov r15, [rip + 6f + 176]",
    "   jmp [rip + 6f + 184]",
    "   .balign 8",
    "torpor_visit_pool:",
    "6: .skip 208",
    "torpor_visit_end:",
    ".popsection",
);

unsafe extern "C" {
    static torpor_site_start: u8;
    static torpor_site_end: u8;
    static torpor_visit_start: u8;
    static torpor_visit_call: u8;
    static torpor_visit_fork: u8;
    static torpor_visit_marked: u8;
    static torpor_visit_pool: u8;
    static torpor_visit_end: u8;
}

fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: both symbols delimit one piece of read-only data laid down above.
    unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

/// The code for a process that is being built. It ends in a breakpoint.
pub(super) fn site() -> &'static [u8] {
    between(&raw const torpor_site_start, &raw const torpor_site_end)
}

/// The code for a living task, with the offsets of its entries and of its pool of constants.
pub(super) struct VisitCode {
    pub code: &'static [u8],
    /// Entry that makes one call with the registers as they are; its result is then in rbx.
    pub call: u64,
    /// Entry that makes a twin; its pid is then in rbx.
    pub fork: u64,
    /// Address after the marker call.
    pub marked: u64,
    pub pool: usize,
}

pub(super) fn visit() -> VisitCode {
    let start = &raw const torpor_visit_start;
    let offset = |p: *const u8| between(start, p).len();
    VisitCode {
        code: between(start, &raw const torpor_visit_end),
        call: offset(&raw const torpor_visit_call) as u64,
        fork: offset(&raw const torpor_visit_fork) as u64,
        marked: offset(&raw const torpor_visit_marked) as u64,
        pool: offset(&raw const torpor_visit_pool),
    }
}
