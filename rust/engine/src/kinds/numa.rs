//! On which memory nodes pages are put (set_mempolicy(2), mbind(2)): the policies of threads and of mappings.

use serde::{Deserialize, Serialize};
use torpor_sys::remote::{Arg, Batch, Data, Results};

use super::memory::Area;
use crate::error::Result;

/// Bits of a set of nodes: MAX_NUMNODES of x86-64.
const NODES: usize = 1024;
/// How many are asked in one stop.
const AT_ONCE: usize = 100;
const MPOL_DEFAULT: i32 = 0;
const MPOL_F_ADDR: i32 = 2;

/// A policy other than the default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// MPOL_* and its flags.
    pub mode: i32,
    /// The set of nodes, by 64.
    pub nodes: Vec<u64>,
}

/// Places of an answer.
#[derive(Debug)]
pub struct Asked {
    call: usize,
    mode: Data,
    nodes: Data,
}

impl Asked {
    /// None where it is the default, or the kernel knows of no nodes.
    pub fn answer(&self, results: &Results) -> Option<Policy> {
        let mode = results.i32(self.mode);
        if results.raw(self.call) < 0 || mode == MPOL_DEFAULT {
            return None;
        }
        let word = |c: &[u8]| c.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
        let mut nodes: Vec<u64> = results.bytes(self.nodes).chunks(8).map(word).collect();
        let used = nodes.iter().rposition(|n| *n != 0).map_or(0, |at| at + 1);
        nodes.truncate(used);
        Some(Policy { mode, nodes })
    }
}

fn ask(batch: &mut Batch, address: Arg, flags: i32) -> Asked {
    let (mode, nodes) = (batch.room(8), batch.room(NODES / 8));
    let args = [mode.into(), nodes.into(), NODES.into(), address, flags.into()];
    let call = batch.may("get_mempolicy", libc::SYS_get_mempolicy, args);
    Asked { call, mode, nodes }
}

/// Asks for the policy of a thread.
pub fn ask_thread(batch: &mut Batch) -> Asked {
    ask(batch, 0.into(), 0)
}

/// Finds the mappings, by their first addresses, that have a policy of their own.
pub fn collect(starts: &[u64], run: &mut dyn FnMut(&Batch) -> Result<Results>) -> Result<Vec<(u64, Policy)>> {
    let mut special = Vec::new();
    for group in starts.chunks(AT_ONCE) {
        let mut batch = Batch::new();
        let mode = |batch: &mut Batch, start: u64| {
            let mode = batch.room(8);
            let args = [mode.into(), 0.into(), 0.into(), start.into(), MPOL_F_ADDR.into()];
            batch.may("get_mempolicy", libc::SYS_get_mempolicy, args);
            mode
        };
        let modes: Vec<Data> = group.iter().map(|start| mode(&mut batch, *start)).collect();
        let results = run(&batch)?;
        let other = group
            .iter()
            .zip(modes)
            .filter(|(_, mode)| results.i32(*mode) != MPOL_DEFAULT);
        special.extend(other.map(|(start, _)| *start));
    }
    let mut all = Vec::new();
    for group in special.chunks(AT_ONCE / 2) {
        let mut batch = Batch::new();
        let asked: Vec<Asked> = group
            .iter()
            .map(|start| ask(&mut batch, (*start).into(), MPOL_F_ADDR))
            .collect();
        let results = run(&batch)?;
        let found = group
            .iter()
            .zip(&asked)
            .filter_map(|(start, a)| Some((*start, a.answer(&results)?)));
        all.extend(found);
    }
    Ok(all)
}

fn mask(batch: &mut Batch, policy: &Policy) -> (Arg, Arg) {
    if policy.nodes.is_empty() {
        return (0.into(), 0.into());
    }
    let bytes: Vec<u8> = policy.nodes.iter().flat_map(|n| n.to_le_bytes()).collect();
    // The kernel takes one bit less than it is told.
    (batch.data(&bytes).into(), (policy.nodes.len() * 64 + 1).into())
}

/// Gives a thread its policy.
pub fn rebuild_thread(batch: &mut Batch, policy: Option<&Policy>) {
    if let Some(policy) = policy {
        let (nodes, count) = mask(batch, policy);
        batch.must(
            "set_mempolicy",
            libc::SYS_set_mempolicy,
            [policy.mode.into(), nodes, count],
        );
    }
}

/// Gives a mapping its policy, before there are pages in it.
pub fn rebuild_area(batch: &mut Batch, area: &Area) {
    if let Some(policy) = &area.policy {
        let (nodes, count) = mask(batch, policy);
        let len = (area.end - area.start).into();
        let args = [area.start.into(), len, policy.mode.into(), nodes, count, 0.into()];
        batch.must(
            format!("mbind of {:x}-{:x}", area.start, area.end),
            libc::SYS_mbind,
            args,
        );
    }
}
