//! Making network sockets again: all of them bound, then all ends of all connections, then everything that moves.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use torpor_image::BlobRef;
use torpor_sys::socket::segment::End;
use torpor_sys::socket::{self, Address, options, tcp};
use torpor_sys::{Pid, fd, namespace};

use super::connection::{self, Bytes, Mate};
use super::{Datagram, Endpoint, Protocol, State, udp};
use crate::error::{About, Error, Result};
use crate::kinds::creds::IdMaps;

type Made<T> = torpor_sys::Result<T>;

/// Makes the sockets in the network namespace of `init`, in the order of `states`. `blob` reads bytes of the image.
pub fn rebuild<'a>(init: Pid, states: &[&'a State], blob: &dyn Fn(BlobRef) -> Result<Vec<u8>>) -> Result<Vec<OwnedFd>> {
    let bytes = |state: &&State| match &state.connection {
        None => Ok(None),
        Some(c) => Ok(Some(Bytes {
            send: blob(c.send.data)?,
            receive: blob(c.receive.data)?,
        })),
    };
    let bytes = states.iter().map(bytes).collect::<Result<Vec<_>>>()?;
    let queue = |state: &&'a State| state.queue.iter().map(|d| Ok((d, blob(d.data)?))).collect();
    let queues = states.iter().map(queue).collect::<Result<Vec<Vec<_>>>>()?;
    let parts = states.iter().zip(bytes).zip(queues);
    let maps = IdMaps::of(init)?;
    let part = |((state, bytes), queue): ((&&'a State, _), _)| Part {
        state,
        bytes,
        queue,
        owner: maps.outer_owner(state.owner),
    };
    let parts: Vec<Part<'_>> = parts.map(part).collect();
    if let Some(bad) = states.iter().find(|s| !s.queue.is_empty() && !s.is_alone_at_its_port()) {
        return Err(Error::nonsense(format!("datagrams that nobody can have sent: {bad:?}")));
    }
    if let Some(bad) = states
        .iter()
        .find(|s| s.connection.is_some() && (s.local.is_none() || s.peer.is_none()))
    {
        return Err(Error::nonsense(format!("a connection without addresses: {bad:?}")));
    }
    namespace::within(init, &["net"], || run(&parts)).about(init, "network sockets")
}

/// A socket and what it holds.
struct Part<'a> {
    state: &'a State,
    bytes: Option<Bytes>,
    /// Datagrams that wait in it.
    queue: Vec<(&'a Datagram, Vec<u8>)>,
    /// Mode, user and group as we number them.
    owner: (u32, u32, u32),
}

type Work = for<'a, 'b, 'c> fn(&'a Part<'b>, &'c OwnedFd) -> Made<()>;

fn run(parts: &[Part<'_>]) -> Made<Vec<OwnedFd>> {
    let is_near = |p: &&Part<'_>| {
        p.state
            .local
            .as_ref()
            .is_some_and(|l| connection::is_loopback(&l.address))
    };
    let arrives = |p: &Part<'_>| !p.queue.is_empty();
    if parts.iter().any(|p| (p.bytes.is_some() && is_near(&p)) || arrives(p)) {
        socket::raise_loopback()?;
    }
    let made = parts.iter().map(Part::create).collect::<Made<Vec<_>>>()?;
    let each = |work: Work| parts.iter().zip(&made).try_for_each(|(p, fd)| work(p, fd));
    // A port that one listens on takes no other, so all are bound before.
    each(|p, fd| p.start(fd))?;
    each(|p, fd| p.call(fd))?;
    let ghosts = parts
        .iter()
        .filter_map(|p| p.ghost().transpose())
        .collect::<Made<Vec<_>>>()?;
    // Every end is there: whatever one sends now finds the other.
    each(|p, fd| p.leave_repair(fd))?;
    ghosts.iter().try_for_each(|g| tcp::leave(g, false))?;
    drop(ghosts);
    each(|p, fd| p.go_on(fd))?;
    each(|p, fd| p.finish(fd))?;
    Ok(made)
}

impl Part<'_> {
    /// With its options, and bound; an end of a connection connected too, in repair.
    fn create(&self) -> Made<OwnedFd> {
        let state = self.state;
        let socket = socket::create(state.family(), state.protocol.kind(), 0)?;
        options::apply(&socket, &state.options)?;
        if state.protocol == Protocol::Tcp {
            // What is left of old connections must not keep the port.
            options::set_int(&socket, libc::SO_REUSEADDR, 1, "SO_REUSEADDR")?;
        }
        let Some(local) = &state.local else { return Ok(socket) };
        let local = local.here(&socket)?;
        match self.in_repair() {
            Some((connection, peer, bytes)) => connection.open(&socket, &local, &peer.here(&socket)?, bytes)?,
            None if state.reset => reset(state, &socket, &local)?,
            None => socket::bind(&socket, &local)?,
        }
        if let (Some(local), false) = (&state.local, self.queue.is_empty()) {
            // From anybody, so before it has a peer.
            udp::arrive(&socket, local.address.port(), &self.queue)?;
        }
        Ok(socket)
    }

    /// A connection that is made without packets.
    fn in_repair(&self) -> Option<(&connection::State, &Endpoint, &Bytes)> {
        let connection = self.state.connection.as_deref().filter(|c| c.mate != Mate::Waiting)?;
        Some((connection, self.state.peer.as_ref()?, self.bytes.as_ref()?))
    }

    fn start(&self, socket: &OwnedFd) -> Made<()> {
        if let (Some(peer), Protocol::Udp) = (&self.state.peer, self.state.protocol) {
            socket::connect(socket, Some(&peer.here(socket)?))?;
        }
        for group in &self.state.groups {
            socket::join(socket, socket::device_index(socket, &group.device)?, group.address)?;
        }
        self.state
            .backlog
            .map_or(Ok(()), |backlog| socket::listen(socket, backlog))
    }

    /// Calls whoever has not accepted yet.
    fn call(&self, socket: &OwnedFd) -> Made<()> {
        let waits = self.state.connection.as_ref().is_some_and(|c| c.mate == Mate::Waiting);
        match &self.state.peer {
            Some(peer) if waits || self.state.connecting => socket::connect_later(socket, &peer.here(socket)?),
            _ => Ok(()),
        }
    }

    /// The other end of a connection whose peer has been closed.
    fn ghost(&self) -> Made<Option<OwnedFd>> {
        let Some((connection, peer, bytes)) = self.in_repair().filter(|(c, ..)| c.mate == Mate::Gone) else {
            return Ok(None);
        };
        let Some(local) = &self.state.local else {
            return Ok(None);
        };
        let ghost = socket::create(self.state.family(), libc::SOCK_STREAM, 0)?;
        let (mirror, none) = connection.mirror(bytes);
        mirror.open(&ghost, &peer.here(&ghost)?, &local.here(&ghost)?, &none)?;
        Ok(Some(ghost))
    }

    fn leave_repair(&self, socket: &OwnedFd) -> Made<()> {
        match self.in_repair() {
            Some((connection, peer, bytes)) => {
                let end = self.end_of_peer(connection, peer, bytes);
                connection.start(socket)?;
                end.map_or(Ok(()), |end| end.arrive())
            }
            None => Ok(()),
        }
    }

    /// A peer outside has said that it sends no more, and will not say so again.
    fn end_of_peer(&self, connection: &connection::State, peer: &Endpoint, bytes: &Bytes) -> Option<End> {
        let scale = connection.agreed.scales.map_or(0, |s| s.0);
        (connection.mate == Mate::Outside && connection.receive.ends).then_some(End {
            from: peer.address,
            to: self.state.local.as_ref()?.address,
            sequence: connection.receive.sequence.wrapping_add(bytes.receive.len() as u32),
            acknowledged: connection.send.sequence,
            window: u16::try_from(connection.window[1] >> scale).unwrap_or(u16::MAX),
        })
    }

    fn go_on(&self, socket: &OwnedFd) -> Made<()> {
        let (Some(connection), Some(bytes)) = (&self.state.connection, &self.bytes) else {
            return Ok(());
        };
        let locks = |name, bit| if self.state.options.contains_key(name) { bit } else { 0 };
        connection.go_on(socket, bytes, locks("SO_SNDBUF", 1) | locks("SO_RCVBUF", 2))
    }

    fn finish(&self, socket: &OwnedFd) -> Made<()> {
        if self.state.protocol == Protocol::Tcp {
            let reuse = self.state.options.contains_key("SO_REUSEADDR");
            options::set_int(socket, libc::SO_REUSEADDR, reuse.into(), "SO_REUSEADDR")?;
        }
        socket::shutdown(socket, self.state.shutdown)?;
        let id = fd::stat(socket)?;
        let (mode, uid, gid) = self.owner;
        if (id.mode, id.uid, id.gid) != self.owner {
            fd::set_owner(socket, mode, uid, gid)
        } else {
            Ok(())
        }
    }
}

/// A connection that its peer has reset: the program reads ECONNRESET. The peer that does it is ours.
fn reset(state: &State, socket: &OwnedFd, local: &Address) -> Made<()> {
    socket::raise_loopback()?;
    let listening = socket::create(state.family(), libc::SOCK_STREAM, 0)?;
    let mut near: SocketAddr = if state.v6 {
        ([0, 0, 0, 0, 0, 0, 0, 1], 0).into()
    } else {
        ([127, 0, 0, 1], 0).into()
    };
    if state.v6
        && state
            .local
            .as_ref()
            .is_some_and(|l| l.address.ip().to_canonical().is_ipv4())
    {
        near = ([0, 0, 0, 0, 0, 0xffff, 0x7f00, 1], 0).into();
    }
    socket::bind(&listening, &Address::Inet(near))?;
    socket::listen(&listening, 1)?;
    // The address that it had may be none of this machine's.
    let _ = socket::bind(socket, local);
    socket::connect(socket, Some(&socket::local(&listening)?))?;
    let peer = socket::accept_next(&listening)?;
    let at_once = [1i32.to_ne_bytes(), 0i32.to_ne_bytes()].concat();
    options::set(&peer, libc::SOL_SOCKET, libc::SO_LINGER, &at_once, "SO_LINGER")
}

impl Endpoint {
    pub(super) fn here(&self, socket: &OwnedFd) -> torpor_sys::Result<Address> {
        let mut address = self.address;
        if let SocketAddr::V6(v6) = &mut address
            && !self.device.is_empty()
        {
            v6.set_scope_id(socket::device_index(socket, &self.device)?);
        }
        Ok(Address::Inet(address))
    }
}
