//! System V message queues: messages with their types, in order (msgop(2)).

use serde::{Deserialize, Serialize};
use torpor_image::{BlobRef, Reader};
use torpor_sys::Pid;
use torpor_sys::sysv::{self, Kind, Message};

use super::limits::{Raised, Values, number};
use super::{IdMaps, Owner, Scene, name};
use crate::bounds::Bounds;
use crate::error::{Error, Result};

/// A message queue.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Its id.
    pub id: i32,
    /// Whose it is.
    #[serde(flatten)]
    pub owner: Owner,
    /// How many bytes it may hold.
    pub max_bytes: u64,
    /// Type and length of each message, in order.
    pub messages: Vec<(i64, u64)>,
    /// Their texts, one after another.
    pub texts: BlobRef,
}

/// # Errors
/// Refused: a kernel that does not show messages, and messages that could not be sent again.
pub(super) fn collect(
    scene: &Scene<'_>,
    id: i32,
    queue: &sysv::Queue,
    messages: Option<&[Message]>,
    limits: &Values,
    blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>,
) -> Result<State> {
    let refuse = |why: String, remedy| {
        let object = name(Kind::Msg, id, queue.owner.key);
        Err(Error::unsupported(scene.init, object, why, remedy))
    };
    let Some(messages) = messages else {
        let why = "this kernel does not show its messages (CONFIG_CHECKPOINT_RESTORE)".into();
        return refuse(why, "let the container receive them first");
    };
    let most = number(limits, "kernel/msgmax", 0);
    if let Some(long) = messages.iter().map(|m| m.1.len() as u64).find(|len| *len > most) {
        let why = format!("it holds a message of {long} bytes, and kernel.msgmax was lowered to {most} since");
        return refuse(why, "raise it again");
    }
    let texts: Vec<u8> = messages.iter().flat_map(|m| m.1.iter().copied()).collect();
    Ok(State {
        id,
        owner: Owner::of(&queue.owner, scene.maps),
        max_bytes: queue.max_bytes,
        messages: messages.iter().map(|m| (m.0, m.1.len() as u64)).collect(),
        texts: blob(&texts)?,
    })
}

/// # Errors
/// Refused: a queue that is larger than the container could make it.
pub(super) fn plan(queues: &[State], init: Pid, bounds: &Bounds) -> Result<()> {
    const CAP_SYS_RESOURCE: u64 = 24;
    // include/uapi/linux/msg.h, MSGMNB: what a new namespace allows.
    const MSGMNB: u64 = 16384;
    for queue in queues {
        let held: u64 = queue.messages.iter().map(|m| m.1).fold(0, u64::saturating_add);
        let most = queue.max_bytes.max(held);
        if most > MSGMNB && !bounds.grants(CAP_SYS_RESOURCE) && !bounds.may_change_limits() {
            let object = name(Kind::Msg, queue.id, queue.owner.key);
            let why = format!("it may hold {most} bytes, which needs CAP_SYS_RESOURCE");
            return Err(Error::refused(init, object, why));
        }
    }
    Ok(())
}

/// The texts of all messages, read and compared with what the image says of them.
pub(super) fn texts(queues: &[State], image: &Reader) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    for queue in queues {
        let texts = image.blob(queue.texts)?;
        let len: u64 = queue.messages.iter().map(|m| m.1).fold(0, u64::saturating_add);
        if len != texts.len() as u64 {
            return Err(Error::nonsense(format!("message queue {} is cut off", queue.id)));
        }
        all.push(texts);
    }
    Ok(all)
}

/// Makes queues again in the namespace of the calling thread.
pub(super) fn rebuild(queues: &[State], texts: &[Vec<u8>], maps: &IdMaps) -> torpor_sys::Result<()> {
    // A queue may be larger than new ones now: then they were made smaller later, or it was made larger.
    let bytes = |q: &State, text: &Vec<u8>| q.max_bytes.max(text.len() as u64).max(q.messages.len() as u64);
    let most = queues.iter().zip(texts).map(|(q, t)| bytes(q, t)).max();
    let raised = most.map_or(Ok(None), |most| Raised::to("kernel/msgmnb", most))?;
    for (queue, texts) in queues.iter().zip(texts) {
        let owner = queue.owner.outside(maps);
        super::make(Kind::Msg, queue.id, &owner, || sysv::make_queue(&owner))?;
        let mut rest = texts.as_slice();
        for &(kind, len) in &queue.messages {
            let (text, after) = rest.split_at(len as usize);
            sysv::send(queue.id, kind, text)?;
            rest = after;
        }
        sysv::own_queue(queue.id, &owner, queue.max_bytes)?;
    }
    drop(raised);
    Ok(())
}
