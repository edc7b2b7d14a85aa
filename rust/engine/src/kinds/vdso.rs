//! The kernel's code page (vdso) and its data pages (vvar): found again by content, moved to where they were.

use serde::{Deserialize, Serialize};
use torpor_sys::mem::Memory;
use torpor_sys::proc::Vma;
use torpor_sys::remote::Batch;
use torpor_sys::remote::visit::MARK;

use crate::error::{About, Error, Result};

/// Which kernel's vdso the image was made with.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Name and size in bytes of each part, in the order of their addresses.
    pub parts: Vec<(String, u64)>,
    /// xxh3 of the code.
    pub digest: String,
}

/// True for the mappings that the kernel gives to every process.
pub fn is_part(vma: &Vma) -> bool {
    vma.name == "[vdso]" || vma.name.starts_with("[vvar")
}

/// The code of the vdso without the tail that a visit may have used.
fn code(memory: &Memory, vdso: &Vma) -> Result<Vec<u8>> {
    let mut bytes = vec![0; vdso.len() as usize];
    memory.read(vdso.start, &mut bytes).about(memory.pid(), "vdso")?;
    // What a killed tracer has left in the tail is not the kernel's.
    if let Some(at) = (0..bytes.len()).step_by(64).find(|at| bytes[*at..].starts_with(&MARK)) {
        bytes.truncate(at);
    }
    let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |p| p + 1);
    bytes.truncate(used);
    Ok(bytes)
}

/// What the vdso of a process is. Must be called before the process is visited.
pub fn collect(memory: &Memory, vmas: &[Vma]) -> Result<State> {
    let parts: Vec<&Vma> = vmas.iter().filter(|v| is_part(v)).collect();
    let digest = match parts.iter().find(|v| v.name == "[vdso]") {
        Some(vdso) => format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&code(memory, vdso)?)),
        None => String::new(),
    };
    Ok(State {
        parts: parts.iter().map(|v| (v.name.clone(), v.len())).collect(),
        digest,
    })
}

/// The address of a `syscall` instruction in the vdso.
pub fn syscall_instruction(memory: &Memory, vmas: &[Vma]) -> Result<Option<u64>> {
    let Some(vdso) = vmas.iter().find(|v| v.name == "[vdso]") else {
        return Ok(None);
    };
    let code = code(memory, vdso)?;
    Ok(code
        .windows(2)
        .position(|w| w == [0x0f, 0x05])
        .map(|at| vdso.start + at as u64))
}

/// # Errors
/// Refused when this kernel's vdso is another: code addresses inside it may be on the stacks of the image.
pub fn plan(wanted: &State, here: &State) -> Result<()> {
    if wanted == here {
        return Ok(());
    }
    Err(Error::unsupported(
        1,
        "vdso",
        format!(
            "the image was made on another kernel (vdso {} here {})",
            wanted.digest, here.digest
        ),
        "restore on the kernel that it was made on",
    ))
}

/// # Errors
/// Refused when a process has not all of the parts in one piece each.
pub fn plan_parts(pid: i32, wanted: &State, kernel: &[(u64, u64)]) -> Result<()> {
    if kernel.iter().map(|k| k.1).eq(wanted.parts.iter().map(|p| p.1)) {
        return Ok(());
    }
    Err(Error::unsupported(
        pid,
        "vdso",
        "the process has unmapped or split it, which is not carried yet",
        "",
    ))
}

/// Moves the parts of a process to where they were, through a place apart, since old and new may overlap.
pub fn rebuild(batch: &mut Batch, now: &[(u64, u64)], wanted: &[(u64, u64)], apart: u64) {
    let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let mut parked = apart;
    for &(start, len) in now {
        let args = [start.into(), len.into(), len.into(), fixed.into(), parked.into()];
        batch.must("moving the vdso", libc::SYS_mremap, args);
        parked += len;
    }
    parked = apart;
    for (&(start, len), _) in wanted.iter().zip(now) {
        let args = [parked.into(), len.into(), len.into(), fixed.into(), start.into()];
        batch.must("moving the vdso to its place", libc::SYS_mremap, args);
        parked += len;
    }
}
