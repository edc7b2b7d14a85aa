//! The kernel's code page (vdso) and its data pages (vvar): found again by content, moved to where they were. Where this
//! kernel's are others than the image's, see [`old`].

mod entries;
pub mod old;

use serde::{Deserialize, Serialize};
use torpor_image::{BlobRef, Reader};
use torpor_sys::Pid;
use torpor_sys::mem::Memory;
use torpor_sys::proc::{self, Vma};
use torpor_sys::remote::Batch;
use torpor_sys::remote::visit::MARK;

use self::old::{Here, Old};
use crate::error::{About, Error, Result};
use crate::model::Inventory;

/// Which kernel's vdso the image was made with.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Name and size in bytes of each part, in the order of their addresses.
    pub parts: Vec<(String, u64)>,
    /// xxh3 of the code.
    pub digest: String,
    /// The code, for a kernel that has another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<BlobRef>,
}

impl State {
    fn is_of(&self, here: &State) -> bool {
        (&self.parts, &self.digest) == (&here.parts, &here.digest)
    }
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
fn look(memory: &Memory, vmas: &[Vma]) -> Result<(State, Vec<u8>)> {
    let parts: Vec<&Vma> = vmas.iter().filter(|v| is_part(v)).collect();
    let code = match parts.iter().find(|v| v.name == "[vdso]") {
        Some(vdso) => code(memory, vdso)?,
        None => Vec::new(),
    };
    let state = State {
        parts: parts.iter().map(|v| (v.name.clone(), v.len())).collect(),
        digest: format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&code)),
        code: None,
    };
    Ok((state, code))
}

fn own() -> Result<(State, Here)> {
    let me = std::process::id() as Pid;
    let memory = Memory::open(me).about(me, "own memory")?;
    let vmas = proc::maps(me).about(me, "own maps")?;
    let (state, code) = look(&memory, &vmas)?;
    let first = vmas.iter().find(|v| is_part(v)).map_or(0, |v| v.start);
    let parts = vmas.iter().filter(|v| is_part(v)).map(|v| (v.start - first, v.len()));
    let parts = parts.collect();
    Ok((state, Here { parts, code }))
}

/// What the kernel gives to every process, with its code stored by `blob`.
pub fn collect(blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>) -> Result<State> {
    let (mut state, here) = own()?;
    state.code = Some(blob(&here.code)?);
    Ok(state)
}

/// # Errors
/// Refused: a process that has no longer what the kernel gave it. Must be called before the process is visited.
pub fn check(pid: Pid, memory: &Memory, vmas: &[Vma], kernels: &State) -> Result<()> {
    if look(memory, vmas)?.0.is_of(kernels) {
        return Ok(());
    }
    let why = "the process has changed, unmapped or split it, which is not carried";
    Err(Error::unsupported(pid, "vdso", why, ""))
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

/// Where this kernel's vdso is another than the image's, prepares the image's processes for both.
///
/// # Errors
/// Refused when the image does not hold its own.
pub fn plan(inventory: &mut Inventory, image: &Reader) -> Result<Old> {
    let (state, here) = own()?;
    let wanted = &inventory.vdso;
    if wanted.is_of(&state) {
        return Ok(Old::default());
    }
    let Some(code) = wanted.code else {
        let why = format!(
            "the image was made on another kernel (vdso {} here {}) and does not hold that one's",
            wanted.digest, state.digest
        );
        let remedy = "restore on the kernel that it was made on";
        return Err(Error::unsupported(1, "vdso", why, remedy));
    };
    Old::adopt(inventory, &image.blob(code)?, &here)
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
