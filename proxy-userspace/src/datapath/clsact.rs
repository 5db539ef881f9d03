//! Programs at the two hooks of a device's clsact qdisc, over netlink: how kernels without tcx run them.
//!
//! A filter belongs to its device, to no process and no pin: it stays until somebody removes it, it, its qdisc or its device.
//! So it is told by its name whose it is. Filters of others, at any priority, are never changed; a qdisc is removed only by
//! who asks for it, and only while no filter is there.
//!
//! aya attaches programs this way too, but by a device's name, which may change; it lists no filters, and takes its own away
//! when their owner is dropped.
//! May touch: clsact qdiscs and filters of the calling thread's network namespace. Knows no pins (`filter`).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use rtnetlink::packet_core::{
    NLA_HEADER_SIZE, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NlasIterator,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption, TcU32OptionFlags,
};
use rtnetlink::sys::Socket;
use rtnetlink::sys::protocols::NETLINK_ROUTE;

/// What the names of our filters begin with.
pub const NAME: &str = "shunt:";
/// Handle of our filters: others ask for 1 or take what the kernel gives, from 1 up.
const HANDLE: u32 = 0x5368;
/// The qdisc's kind.
const CLSACT: &str = "clsact";
/// Handle of whatever qdisc a device has at its ingress (linux/pkt_sched.h, TC_H_CLSACT and TC_H_INGRESS).
const QDISC: TcHandle = TcHandle { major: 0xffff, minor: 0 };
/// All protocols (linux/if_ether.h).
const ETH_P_ALL: u16 = 3;

// linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
// linux/rtnetlink.h
const RTM_NEWTFILTER: u16 = 44;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
// linux/pkt_cls.h
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_ID: u16 = 11;
/// Bytes of `struct tcmsg`, which opens every message's body.
const HEADER: usize = 20;

/// A place of a clsact qdisc where filters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Packets that the device has received.
    Ingress,
    /// Packets that it is to send.
    Egress,
}

impl Hook {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    const fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => TcHandle::MIN_INGRESS,
            Self::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle { major: 0xffff, minor }
    }
}

/// A filter, or the set of filters of one priority.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Lower ones run first.
    pub priority: u16,
    /// As an Ethernet type.
    pub protocol: u16,
    /// Chain; packets enter at 0.
    pub chain: u32,
    /// "bpf", "flower", ...
    pub kind: String,
    /// Within its priority; 0: this is the set, not one of its filters.
    pub handle: u32,
    /// What who made it calls it; of programs only.
    pub name: String,
    /// Program behind it; of programs only.
    pub program: u32,
}

impl Filter {
    /// True if some agent made it.
    pub fn is_ours(&self) -> bool {
        self.kind == TcFilterBpf::KIND && self.handle != 0 && self.name.starts_with(NAME)
    }

    /// From the body of a message; none if that is too short for one.
    fn parse(body: &[u8]) -> Option<Self> {
        let info = TcHeader::parse(body).ok()?;
        let mut filter = Self {
            // The numbers of linux/pkt_cls.h: priority and protocol in one word, the latter in network byte order.
            priority: (info.info >> 16) as u16,
            protocol: u16::from_be(info.info as u16),
            handle: info.handle.into(),
            ..Self::default()
        };
        let mut options: &[u8] = &[];
        // What cannot be read does not make a filter none: it keeps its qdisc.
        for attribute in NlasIterator::new(body.get(HEADER..)?).flatten() {
            match attribute.kind() {
                TCA_KIND => filter.kind = text(attribute.value()),
                TCA_CHAIN => filter.chain = number(attribute.value()),
                TCA_OPTIONS => options = &attribute.into_inner()[NLA_HEADER_SIZE..attribute.length().into()],
                _ => {}
            }
        }
        // Options of other kinds are their own affair, and not always attributes.
        if filter.kind == TcFilterBpf::KIND {
            for option in NlasIterator::new(options).flatten() {
                match option.kind() {
                    TCA_BPF_NAME => filter.name = text(option.value()),
                    TCA_BPF_ID => filter.program = number(option.value()),
                    _ => {}
                }
            }
        }
        Some(filter)
    }
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned()
}

fn number(value: &[u8]) -> u32 {
    value.try_into().map_or(0, u32::from_ne_bytes)
}

/// All filters at a hook, in the order in which they run; none if the device or its qdisc is gone.
pub fn list(device: u32, hook: Hook) -> io::Result<Vec<Filter>> {
    let message = message(device, hook.parent(), TcHandle::UNSPEC, vec![]);
    let mut filters = Vec::new();
    exchange(RouteNetlinkMessage::GetTrafficFilter(message), NLM_F_DUMP, |body| filters.extend(Filter::parse(body)))?;
    Ok(filters)
}

/// Our filter at a hook.
pub fn find(device: u32, hook: Hook) -> io::Result<Option<Filter>> {
    Ok(list(device, hook)?.into_iter().find(Filter::is_ours))
}

/// Makes the device's qdisc; false if it is there.
///
/// Errors: the device has a qdisc `ingress` in its place, which has no hook for packets that it sends.
pub fn ensure_qdisc(device: u32) -> io::Result<bool> {
    match request(RouteNetlinkMessage::NewQueueDiscipline(qdisc(device)), NLM_F_CREATE | NLM_F_EXCL) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => check_kind(device).map(|()| false),
        result => result.map(|()| true),
    }
}

/// Filters given to the other qdisc's egress would run at its ingress.
fn check_kind(device: u32) -> io::Result<()> {
    // Changes what is there into what it is, which the kernel refuses for another kind.
    match request(RouteNetlinkMessage::NewQueueDiscipline(qdisc(device)), 0) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let why =
                "it has a qdisc of kind ingress where clsact has to be; remove that (tc qdisc del dev DEVICE ingress)";
            Err(io::Error::new(io::ErrorKind::ResourceBusy, why))
        }
        result => result,
    }
}

/// Removes the device's qdisc, unless it has filters.
pub fn remove_empty_qdisc(device: u32) -> io::Result<()> {
    for hook in Hook::ALL {
        if !list(device, hook)?.is_empty() {
            return Ok(());
        }
    }
    allow_missing(request(RouteNetlinkMessage::DelQueueDiscipline(qdisc(device)), 0))
}

/// Makes our filter: before all others at ingress, after all others at egress, where their priorities allow it. `program` is
/// its program's name.
pub fn add(device: u32, hook: Hook, program: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let priority = place(&list(device, hook)?, hook).ok_or(io::ErrorKind::QuotaExceeded)?;
    put(device, hook, priority, HANDLE, program, name, NLM_F_CREATE | NLM_F_EXCL)
}

/// Puts another program into a filter, in one step: each packet meets one of the two.
pub fn replace(device: u32, hook: Hook, filter: &Filter, program: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    put(device, hook, filter.priority, filter.handle, program, name, 0)
}

/// Removes one filter; it may be gone.
pub fn remove(device: u32, hook: Hook, filter: &Filter) -> io::Result<()> {
    let attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.to_owned())];
    let mut message = message(device, hook.parent(), filter.handle.into(), attributes);
    message.header.info = info(filter.priority);
    allow_missing(request(RouteNetlinkMessage::DelTrafficFilter(message), 0))
}

fn allow_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        // A qdisc that is not there is a wrong parent.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) => Ok(()),
        result => result,
    }
}

/// The priority at which ours comes as early (late) as it can: one that is free, or that has programs alone, to which the
/// kernel adds in front.
fn place(filters: &[Filter], hook: Hook) -> Option<u16> {
    let takes_ours = |priority: &u16| {
        let mut of_it = filters.iter().filter(|filter| filter.chain == 0 && filter.priority == *priority);
        of_it.all(|filter| filter.kind == TcFilterBpf::KIND && filter.protocol == ETH_P_ALL)
    };
    let mut priorities = 1..=u16::MAX;
    match hook {
        Hook::Ingress => priorities.find(takes_ours),
        Hook::Egress => priorities.rfind(takes_ours),
    }
}

fn put(
    device: u32,
    hook: Hook,
    priority: u16,
    handle: u32,
    program: BorrowedFd<'_>,
    name: &str,
    flags: u16,
) -> io::Result<()> {
    let mut message = filter_message(device, hook, handle, program.as_raw_fd() as u32, name);
    message.header.info = info(priority);
    request(RouteNetlinkMessage::NewTrafficFilter(message), flags)
}

fn filter_message(device: u32, hook: Hook, handle: u32, program: u32, name: &str) -> TcMessage {
    let options = [
        TcFilterBpfOption::ProgFd(program),
        TcFilterBpfOption::ProgName(format!("{NAME}{name}")),
        // What the program returns is what becomes of the packet; -1 (TC_ACT_UNSPEC) is the next filter's affair.
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
        // No driver is asked to run it: our maps are here.
        TcFilterBpfOption::FlagsGeneric(TcU32OptionFlags::SkipHw),
    ];
    let attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(options.map(TcOption::Bpf).to_vec()),
    ];
    message(device, hook.parent(), handle.into(), attributes)
}

/// Priority and protocol as one word.
fn info(priority: u16) -> u32 {
    u32::from(priority) << 16 | u32::from(ETH_P_ALL.to_be())
}

fn qdisc(device: u32) -> TcMessage {
    message(device, TcHandle::CLSACT, QDISC, vec![TcAttribute::Kind(CLSACT.to_owned())])
}

fn message(device: u32, parent: TcHandle, handle: TcHandle, attributes: Vec<TcAttribute>) -> TcMessage {
    let mut message = TcMessage::with_index(device as i32);
    (message.header.parent, message.header.handle, message.attributes) = (parent, handle, attributes);
    message
}

/// Asks for something to be done, and waits until it is.
fn request(message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    exchange(message, flags | NLM_F_ACK, |_| {})
}

/// Sends a message, and calls `visit` with the body of each filter that is answered.
fn exchange(message: RouteNetlinkMessage, flags: u16, mut visit: impl FnMut(&[u8])) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    // A fresh one: no answer to an earlier request is in it.
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.send(&bytes, 0)?;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            match message.message_type() {
                NLMSG_ERROR | NLMSG_DONE => return result(message.payload()),
                RTM_NEWTFILTER => visit(message.payload()),
                _ => {}
            }
            rest = rest.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// The result that the last message carries: zero is success.
fn result(body: &[u8]) -> io::Result<()> {
    let code = body.get(..4).and_then(|code| code.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::Emitable as _;

    use super::*;

    /// What the kernel lists is what was sent, but for the program's id in the place of its descriptor.
    fn as_listed(message: TcMessage, program: u32) -> Vec<u8> {
        let mut message = message;
        for attribute in &mut message.attributes {
            let TcAttribute::Options(options) = attribute else { continue };
            options.retain(|option| !matches!(option, TcOption::Bpf(TcFilterBpfOption::ProgFd(_))));
            options.push(TcOption::Bpf(TcFilterBpfOption::ProgId(program)));
        }
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    #[test]
    fn a_filter_is_read_as_it_is_written() {
        let mut message = filter_message(7, Hook::Egress, HANDLE, 5, "egress");
        message.header.info = info(0xfffe);
        message.attributes.push(TcAttribute::Chain(3));
        assert_eq!(u32::from(message.header.parent), 0xffff_fff3);
        let filter = Filter::parse(&as_listed(message, 42)).unwrap();
        let expected = Filter {
            priority: 0xfffe,
            protocol: ETH_P_ALL,
            chain: 3,
            kind: "bpf".to_owned(),
            handle: HANDLE,
            name: "shunt:egress".to_owned(),
            program: 42,
        };
        assert_eq!(filter, expected);
        assert!(filter.is_ours());
        for foreign in [
            Filter { name: "cil_from_netdev-eth0".to_owned(), ..expected.clone() },
            Filter { kind: "matchall".to_owned(), ..expected.clone() },
            Filter { handle: 0, ..expected },
        ] {
            assert!(!foreign.is_ours(), "{foreign:?}");
        }
    }

    #[test]
    fn filters_of_kinds_that_nobody_knows_are_listed_too() {
        let attributes = vec![TcAttribute::Kind("flower".to_owned())];
        let mut message = message(7, Hook::Ingress.parent(), TcHandle::UNSPEC, attributes);
        message.header.info = 9 << 16 | u32::from(0x0800u16.to_be());
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        // Options that are no attributes.
        bytes.extend([8, 0, 2, 0, 0xff, 0xff, 0xff, 0xff]);
        let filter = Filter::parse(&bytes).unwrap();
        let expected = Filter { priority: 9, protocol: 0x0800, kind: "flower".to_owned(), ..Filter::default() };
        assert_eq!(filter, expected);
        assert_eq!(Filter::parse(&bytes[..HEADER - 1]), None);
    }

    #[test]
    fn ours_comes_first_in_and_last_out_where_it_can() {
        let at =
            |priority, kind: &str, protocol| Filter { priority, protocol, kind: kind.to_owned(), ..Filter::default() };
        let both = |filters: &[Filter]| Hook::ALL.map(|hook| place(filters, hook));
        assert_eq!(both(&[]), [Some(1), Some(u16::MAX)]);
        let programs = [at(1, "bpf", ETH_P_ALL), at(u16::MAX, "bpf", ETH_P_ALL)];
        assert_eq!(both(&programs), [Some(1), Some(u16::MAX)], "the kernel adds in front");
        let others = [at(1, "flower", ETH_P_ALL), at(2, "bpf", 0x0800), at(u16::MAX, "matchall", ETH_P_ALL)];
        assert_eq!(both(&others), [Some(3), Some(u16::MAX - 1)]);
        let elsewhere = [Filter { chain: 1, ..at(1, "flower", ETH_P_ALL) }];
        assert_eq!(both(&elsewhere), [Some(1), Some(u16::MAX)]);
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error() {
        assert!(result(&0i32.to_ne_bytes()).is_ok());
        assert_eq!(result(&(-libc::ENODEV).to_ne_bytes()).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }
}
