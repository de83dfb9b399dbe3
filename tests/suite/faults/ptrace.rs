//! The few words of `ptrace` that an injector needs.

#![expect(unsafe_code, reason = "nothing safe speaks ptrace; all of it is in this file")]

use std::ffi::{c_int, c_long, c_void};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::null_mut;

pub(super) type Tid = libc::pid_t;
pub(super) type Registers = libc::user_regs_struct;

/// Why a thread of the traced program stands still, or does not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// At the beginning of a system call.
    Entry,
    /// At its end.
    Exit,
    /// A new thread, which was stopped so that it can be traced; or there is one.
    Thread,
    Signal(c_int),
    Ended(c_int),
    Killed(c_int),
}

/// Lets a program be traced by the thread that starts it: it stands still when it is loaded.
pub(super) fn trace(command: &mut Command) {
    let traced = || check(request(libc::PTRACE_TRACEME, 0, null_mut(), null_mut()));
    // SAFETY: between fork and exec, this calls nothing but ptrace and reads errno
    unsafe { command.pre_exec(traced) };
}

/// Follows all threads, and has the program killed should this one end.
pub(super) fn follow(tid: Tid) -> io::Result<()> {
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
    check(request(libc::PTRACE_SETOPTIONS, tid, null_mut(), number(options)))
}

/// Goes on to the next system call, or to the end.
pub(super) fn resume(tid: Tid, to_next_call: bool, signal: c_int) -> io::Result<()> {
    let kind = if to_next_call { libc::PTRACE_SYSCALL } else { libc::PTRACE_CONT };
    check(request(kind, tid, null_mut(), number(signal)))
}

pub(super) fn registers(tid: Tid) -> io::Result<Registers> {
    // SAFETY: the registers are plain numbers, for which zero is a value
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    check(request(libc::PTRACE_GETREGS, tid, null_mut(), (&raw mut registers).cast()))?;
    Ok(registers)
}

pub(super) fn set_registers(tid: Tid, mut registers: Registers) -> io::Result<()> {
    check(request(libc::PTRACE_SETREGS, tid, null_mut(), (&raw mut registers).cast()))
}

/// Waits for any of the threads that this one traces.
pub(super) fn wait() -> io::Result<(Tid, Stop)> {
    let mut status = 0;
    // SAFETY: the kernel writes one number
    let tid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
    if tid < 0 {
        return Err(io::Error::last_os_error());
    }
    let stop = if libc::WIFEXITED(status) {
        Stop::Ended(libc::WEXITSTATUS(status))
    } else if libc::WIFSIGNALED(status) {
        Stop::Killed(libc::WTERMSIG(status))
    } else if status >> 16 != 0 {
        Stop::Thread
    } else if libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80 {
        // one that was killed meanwhile has no side
        side(tid).unwrap_or(Stop::Thread)
    } else {
        Stop::Signal(libc::WSTOPSIG(status))
    };
    Ok((tid, stop))
}

/// Which end of a system call it is.
fn side(tid: Tid) -> io::Result<Stop> {
    // SAFETY: the structure is plain numbers, for which zero is a value
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let size = size_of_val(&info) as *mut c_void;
    check(request(libc::PTRACE_GET_SYSCALL_INFO, tid, size, (&raw mut info).cast()))?;
    Ok(if info.op == libc::PTRACE_SYSCALL_INFO_ENTRY { Stop::Entry } else { Stop::Exit })
}

fn request(kind: libc::c_uint, tid: Tid, address: *mut c_void, data: *mut c_void) -> c_long {
    // SAFETY: every caller passes what its request takes: numbers, or a structure that outlives the call
    unsafe { libc::ptrace(kind, tid, address, data) }
}

/// A number where others take a pointer.
fn number(value: c_int) -> *mut c_void {
    usize::try_from(value).unwrap() as *mut c_void
}

fn check(result: c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
