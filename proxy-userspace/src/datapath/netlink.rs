//! Netlink messages as bytes: building them, taking them apart, lists of the kernel.
//!
//! For the families that no library here speaks; routes and devices have rtnetlink. May touch: the sockets it is given.

use std::io;

use super::sys::NetlinkSocket;

// linux/netlink.h
/// Every message to the kernel has it.
const NLM_F_REQUEST: u16 = 1;
/// The kernel says what becomes of the message.
pub const NLM_F_ACK: u16 = 4;
/// A list is wanted.
pub const NLM_F_DUMP: u16 = 0x300;
/// What is created must not be there.
pub const NLM_F_EXCL: u16 = 0x200;
/// What is not there is created.
pub const NLM_F_CREATE: u16 = 0x400;
/// What became of a message.
pub const NLMSG_ERROR: u16 = 2;
/// A list ends.
pub const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = 0x3fff;
/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;

/// Kinds and bodies of messages.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// Types and values of attributes.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & NLA_TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of a type.
pub fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// The result that an error message carries: below zero is an errno.
pub fn answer(body: &[u8]) -> io::Result<()> {
    let code = body.get(..4).and_then(|code| code.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if code >= 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

/// Calls `visit` with kind and body of every element of a list.
pub fn dump(socket: &NetlinkSocket, request: &[u8], mut visit: impl FnMut(u16, &[u8])) -> io::Result<()> {
    socket.send(request)?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = socket.receive(&mut buffer)?;
        for (kind, body) in messages(&buffer[..length]) {
            match kind {
                // A list that cannot be made may end with the reason.
                NLMSG_DONE => return answer(body),
                NLMSG_ERROR => answer(body)?,
                _ => visit(kind, body),
            }
        }
    }
}

/// Sends a request with [`NLM_F_ACK`] and waits for what becomes of it.
pub fn ask(socket: &NetlinkSocket, request: &[u8]) -> io::Result<()> {
    socket.send(request)?;
    let mut buffer = vec![0; 1 << 13];
    loop {
        let length = socket.receive(&mut buffer)?;
        if let Some((_, body)) = messages(&buffer[..length]).find(|(kind, _)| *kind == NLMSG_ERROR) {
            return answer(body);
        }
    }
}

/// A message in the making.
pub struct Message(Vec<u8>);

impl Message {
    /// One that has its family's own header and no attribute.
    pub fn new(kind: u16, flags: u16, sequence: u32, header: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(header);
        Self(bytes)
    }

    /// Adds an attribute.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.0.extend((value.len() as u16 + 4).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// Adds an attribute that is text.
    pub fn text(&mut self, kind: u16, text: &str) {
        self.attribute(kind, &[text.as_bytes(), &[0]].concat());
    }

    /// Adds an attribute that holds others.
    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.attribute(kind | NLA_F_NESTED, &[]);
        fill(self);
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// Its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}
