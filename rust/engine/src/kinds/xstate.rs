//! Extended registers on another processor: whether an image's can be given to threads here.
//!
//! An area in the standard format says itself which kinds of registers the kernel that filled it had switched on (the
//! first of the words that are left to software, arch/x86/include/uapi/asm/sigcontext.h), and which of them hold something.
//! The kernel takes an area only when it is as long as its own.

use torpor_image::Reader;
use torpor_sys::Pid;
use torpor_sys::xsave::Layout;

use crate::error::{Error, Result};
use crate::model::Inventory;

const SWITCHED_ON: usize = 464;
const IN_USE: usize = 512;
const AMX_DATA: u64 = 1 << 18;

/// Kinds of registers by bit.
const NAMES: [(u64, &str); 6] = [
    (1 << 2, "AVX"),
    (3 << 3, "MPX"),
    (7 << 5, "AVX-512"),
    (1 << 9, "protection keys (PKRU)"),
    (3 << 17, "AMX"),
    (1 << 19, "APX"),
];

fn names(features: u64) -> String {
    let known = NAMES.iter().filter(|n| features & n.0 != 0).map(|n| n.1.to_owned());
    let rest = NAMES.iter().fold(features, |rest, n| rest & !n.0);
    let rest = (rest != 0).then(|| format!("kinds {rest:#x}"));
    known.chain(rest).collect::<Vec<_>>().join(", ")
}

fn word(area: &[u8], at: usize) -> Result<u64> {
    let bytes = area.get(at..at + 8).and_then(|b| b.try_into().ok());
    let bytes = bytes.ok_or_else(|| Error::nonsense("a thread has no extended registers"))?;
    Ok(u64::from_le_bytes(bytes))
}

/// # Errors
/// Refused: a process that may use AMX, which has to be asked for before its registers are there.
pub fn check_permission(pid: Pid, permitted: u64) -> Result<()> {
    if permitted & AMX_DATA == 0 {
        return Ok(());
    }
    let why = "it has asked for their use (arch_prctl(2), ARCH_REQ_XCOMP_PERM), which is not carried yet";
    Err(Error::unsupported(pid, "AMX registers", why, ""))
}

/// # Errors
/// Refused: registers that this processor does not have, or has elsewhere. Programs choose once, when they begin, what
/// they use: so whatever the image's processor had counts.
pub fn plan(inventory: &Inventory, image: &Reader) -> Result<()> {
    let threads = || {
        let bodies = inventory.processes.iter().filter_map(|p| p.body.as_ref());
        bodies.flat_map(|b| &b.threads)
    };
    let Some(first) = threads().next() else { return Ok(()) };
    let area = image.blob(first.cpu.xstate)?;
    fits(first.tid, &area, &Layout::here())?;
    if threads().any(|t| t.cpu.xstate.len != first.cpu.xstate.len) {
        return Err(Error::nonsense("threads have different kinds of extended registers"));
    }
    Ok(())
}

fn fits(tid: i32, area: &[u8], here: &Layout) -> Result<()> {
    let had = word(area, SWITCHED_ON)? | word(area, IN_USE)?;
    let refuse = |why: String| {
        let remedy = "restore on a processor of the kind that the image was made on";
        Err(Error::unsupported(tid, "processor", why, remedy))
    };
    let missing = had & !here.features;
    if missing != 0 {
        return refuse(format!("the image's has {}, which this one lacks", names(missing)));
    }
    if area.len() != here.end_of(had) {
        return refuse("this one keeps its extended registers in another order".into());
    }
    Ok(())
}

/// The area as this kernel wants it: with room for what the image's processor did not have.
pub fn widen(area: &[u8], here: &Layout) -> Vec<u8> {
    let mut area = area.to_vec();
    area.resize(area.len().max(here.end_of(here.features)), 0);
    area
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn area(len: usize, switched_on: u64, in_use: u64) -> Vec<u8> {
        let mut area = vec![0; len];
        area[SWITCHED_ON..SWITCHED_ON + 8].copy_from_slice(&switched_on.to_le_bytes());
        area[IN_USE..IN_USE + 8].copy_from_slice(&in_use.to_le_bytes());
        area
    }

    /// As an AMD processor has them, and an Intel one.
    fn layouts() -> (Layout, Layout) {
        let amd = vec![(2, 576, 256), (5, 832, 64), (6, 896, 512), (7, 1408, 1024)];
        let intel = vec![
            (2, 576, 256),
            (5, 1088, 64),
            (6, 1152, 512),
            (7, 1664, 1024),
            (9, 2688, 8),
        ];
        let of = |features, parts| Layout { features, parts };
        (of(0xe7, amd), of(0x2e7, intel))
    }

    #[test]
    fn more_registers_than_the_images_processor_had_are_no_harm() {
        let (amd, intel) = layouts();
        for here in [&amd, &intel] {
            fits(7, &area(832, 7, 3), here).unwrap();
            assert_eq!(widen(&area(832, 7, 3), here).len(), here.end_of(here.features));
        }
        fits(7, &area(2432, 0xe7, 0xe7), &amd).unwrap();
    }

    #[test]
    fn what_a_processor_lacks_or_has_elsewhere_is_refused_by_name() {
        let (amd, intel) = layouts();
        let old = Layout {
            features: 7,
            parts: vec![(2, 576, 256)],
        };
        let why = |area: &[u8], here| fits(7, area, here).unwrap_err().to_string();
        assert!(why(&area(2432, 0xe7, 3), &old).contains("has AVX-512, which this one lacks"));
        assert!(why(&area(2696, 0x2e7, 3), &amd).contains("has protection keys (PKRU), which"));
        assert!(why(&area(2432, 0xe7, 3), &intel).contains("in another order"));
        assert!(why(&[0; 100], &amd).contains("no extended registers"));
    }

    #[test]
    fn a_process_that_may_use_amx_is_refused() {
        check_permission(7, 0xe7).unwrap();
        assert!(check_permission(7, 0x602e7).unwrap_err().to_string().contains("AMX"));
    }
}
