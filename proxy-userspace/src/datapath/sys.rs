//! The system calls that aya does not offer: bpf(2) commands on pins, links and batches, and a few others of the datapath.
//!
//! Each function is safe to call and returns the kernel's own error; names and paths are added by the callers.
//! May touch: libc only. No policy here.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya::Pod;
use aya_obj::generated::{bpf_attach_type, bpf_cmd};

/// What the kernel says about a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapInfo {
    /// Kernel-wide id.
    pub id: u32,
    /// `BPF_MAP_TYPE_` number.
    pub kind: u32,
    /// Bytes.
    pub key_size: u32,
    /// Bytes.
    pub value_size: u32,
    /// Capacity.
    pub max_entries: u32,
    /// `BPF_F_` flags given at creation.
    pub flags: u32,
}

impl MapInfo {
    /// True if each CPU has values of its own.
    pub fn is_per_cpu(&self) -> bool {
        use aya_obj::generated::bpf_map_type::{BPF_MAP_TYPE_PERCPU_ARRAY, BPF_MAP_TYPE_PERCPU_HASH};
        [BPF_MAP_TYPE_PERCPU_ARRAY as u32, BPF_MAP_TYPE_PERCPU_HASH as u32].contains(&self.kind)
    }
}

/// What the kernel says about a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Kernel-wide id.
    pub id: u32,
    /// Program behind the link.
    pub program: u32,
    /// What it is attached to.
    pub target: LinkTarget,
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkTarget {
    /// A control group, by its id (inode number); 0 when the group is gone.
    Cgroup(u64),
    /// A device's tcx hook, by interface index; 0 when the device is gone.
    Tcx(u32),
    /// A device's XDP hook, by interface index; 0 when the device is gone.
    Xdp(u32),
    /// A kind that Shunt does not make.
    Other(u32),
}

/// Place of a tcx program among those of its hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before all that are there now.
    First,
    /// After all that are there now.
    Last,
}

/// Whose hook is looked at.
#[derive(Clone, Copy, Debug)]
pub enum HookTarget<'a> {
    /// A device of the calling thread's network namespace, by interface index.
    Device(u32),
    /// A control group.
    Cgroup(BorrowedFd<'a>),
}

const BPF_F_BEFORE: u32 = 1 << 3;
const BPF_F_AFTER: u32 = 1 << 4;
/// linux/if_link.h
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const BPF_LINK_TYPE_CGROUP: u32 = 3;
const BPF_LINK_TYPE_XDP: u32 = 6;
const BPF_LINK_TYPE_TCX: u32 = 11;

#[repr(C)]
#[derive(Default)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct RawMapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    reserved: u32,
    target: [u32; 4],
}

#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    reserved: u32,
    expected_revision: u64,
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    reserved: u32,
    /// Flags of the programs, ids of the links, flags of the links: not asked for.
    unused: [u64; 3],
    revision: u64,
}

/// Calls bpf(2).
///
/// # Safety
/// Every pointer inside `attr` is valid for what `command` does with it.
unsafe fn bpf<T>(command: bpf_cmd, attr: &mut T) -> io::Result<i64> {
    // SAFETY: `attr` is a live exclusive reference and its size is passed; its inner pointers are the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_long, attr as *mut T, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Like [`bpf`] for commands that return a file descriptor.
///
/// # Safety
/// As [`bpf`], and `command` returns a new descriptor.
unsafe fn bpf_fd<T>(command: bpf_cmd, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attr)? };
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn address<T>(value: &[T]) -> u64 {
    value.as_ptr() as u64
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Pins an object; the file must not exist.
pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: path.as_ptr() as u64, fd: raw(fd), flags: 0 };
    // SAFETY: `path` lives until the call returns.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens a pinned object.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: path.as_ptr() as u64, ..Default::default() };
    // SAFETY: `path` lives until the call returns; the command returns a descriptor.
    unsafe { bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attr) }
}

/// Fills `info` (integers only) with what the kernel knows about `fd`.
fn object_info<T: Default>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attr = InfoAttr { fd: raw(fd), length: size_of::<T>() as u32, info: &raw mut info as u64 };
    // SAFETY: `info` is live, writable and `length` bytes long; callers pass structs of integers.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// Describes a map.
pub fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let info: RawMapInfo = object_info(fd)?;
    Ok(MapInfo {
        id: info.id,
        kind: info.kind,
        key_size: info.key_size,
        value_size: info.value_size,
        max_entries: info.max_entries,
        flags: info.flags,
    })
}

/// Describes a link.
pub fn link_info(fd: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let info: RawLinkInfo = object_info(fd)?;
    let target = match info.kind {
        BPF_LINK_TYPE_CGROUP => LinkTarget::Cgroup(u64::from(info.target[1]) << 32 | u64::from(info.target[0])),
        BPF_LINK_TYPE_TCX => LinkTarget::Tcx(info.target[0]),
        BPF_LINK_TYPE_XDP => LinkTarget::Xdp(info.target[0]),
        other => LinkTarget::Other(other),
    };
    Ok(LinkInfo { id: info.id, program: info.program, target })
}

/// Kernel-wide id of a program.
pub fn program_id(fd: BorrowedFd<'_>) -> io::Result<u32> {
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
    }
    object_info::<Info>(fd).map(|info| info.id)
}

/// An instruction of a BPF program (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What is done, with what kind of operands.
    pub code: u8,
    registers: u8,
    /// In memory, or of a jump.
    pub offset: i16,
    /// An operand.
    pub constant: i32,
}

impl Instruction {
    /// An operation on registers `to` and `from`, each as far as it has them.
    pub const fn new(code: u8, to: u8, from: u8, offset: i16, constant: i32) -> Self {
        // Two bit fields of four bits, in the order of the machine.
        let registers = if cfg!(target_endian = "little") { from << 4 | to } else { to << 4 | from };
        Self { code, registers, offset, constant }
    }

    /// The register that is written, or compared.
    pub const fn to(&self) -> u8 {
        if cfg!(target_endian = "little") { self.registers & 15 } else { self.registers >> 4 }
    }

    /// The register that is read.
    pub const fn from(&self) -> u8 {
        if cfg!(target_endian = "little") { self.registers >> 4 } else { self.registers & 15 }
    }
}

/// Loads a TC program that calls no function reserved to GPL programs.
pub fn load_classifier(instructions: &[Instruction], name: &CStr) -> io::Result<OwnedFd> {
    #[repr(C)]
    #[derive(Default)]
    struct LoadAttr {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
    }
    let mut attr = LoadAttr {
        kind: aya_obj::generated::bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32,
        count: instructions.len() as u32,
        instructions: address(instructions),
        license: c"Dual MIT/GPL".as_ptr() as u64,
        ..Default::default()
    };
    // The last byte stays zero.
    attr.name.iter_mut().take(15).zip(name.to_bytes()).for_each(|(byte, letter)| *byte = *letter);
    // SAFETY: instructions and licence live until the call returns; the command returns a descriptor.
    unsafe { bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr) }
}

/// A map with room for one program to tail-call.
pub fn new_program_array() -> io::Result<OwnedFd> {
    #[repr(C)]
    #[derive(Default)]
    struct CreateAttr {
        kind: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        flags: u32,
    }
    let kind = aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_PROG_ARRAY as u32;
    let mut attr = CreateAttr { kind, key_size: 4, value_size: 4, max_entries: 1, flags: 0 };
    // SAFETY: no pointers; the command returns a descriptor.
    unsafe { bpf_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr) }
}

/// Attaches a program to a control group; the attachment lives as long as the descriptor or a pin of it.
pub fn link_cgroup(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, hook: bpf_attach_type) -> io::Result<OwnedFd> {
    let mut attr =
        LinkCreateAttr { program: raw(program), target: raw(cgroup), attach_type: hook as u32, ..Default::default() };
    // SAFETY: no pointers; the command returns a descriptor.
    unsafe { bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr) }
}

/// Attaches a program to a tcx hook of a device of the calling thread's network namespace.
pub fn link_tcx(program: BorrowedFd<'_>, ifindex: u32, hook: bpf_attach_type, place: Place) -> io::Result<OwnedFd> {
    let flags = match place {
        Place::First => BPF_F_BEFORE,
        Place::Last => BPF_F_AFTER,
    };
    let mut attr = LinkCreateAttr {
        program: raw(program),
        target: ifindex,
        attach_type: hook as u32,
        flags,
        ..Default::default()
    };
    // SAFETY: no pointers; the command returns a descriptor.
    unsafe { bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr) }
}

/// Attaches an XDP program to a device of the calling thread's network namespace, in its driver or not at all.
pub fn link_xdp(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        program: raw(program),
        target: ifindex,
        attach_type: bpf_attach_type::BPF_XDP as u32,
        flags: XDP_FLAGS_DRV_MODE,
        ..Default::default()
    };
    // SAFETY: no pointers; the command returns a descriptor.
    unsafe { bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr) }
}

/// Ids of the programs at a hook, in the order in which they run.
///
/// `target` is an interface index for hooks of devices, else the descriptor of a control group, for which those of the groups
/// above it are listed too. EINVAL: the kernel does not know the hook.
pub fn attached_programs(target: HookTarget<'_>, hook: bpf_attach_type) -> io::Result<Vec<u32>> {
    /// linux/bpf.h
    const BPF_F_QUERY_EFFECTIVE: u32 = 1;
    /// More than any hook can have today: 64 a device or control group (BPF_MPROG_MAX, BPF_CGROUP_MAX_PROGS).
    const MOST: u32 = 1024;
    let (target, query_flags) = match target {
        HookTarget::Device(ifindex) => (ifindex, 0),
        HookTarget::Cgroup(group) => (raw(group), BPF_F_QUERY_EFFECTIVE),
    };
    let mut programs = vec![0u32; MOST as usize];
    let mut attr = QueryAttr {
        target,
        attach_type: hook as u32,
        query_flags,
        programs: programs.as_mut_ptr() as u64,
        count: MOST,
        ..Default::default()
    };
    // SAFETY: `programs` is live, writable and has room for `count` ids.
    unsafe { bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr) }?;
    programs.truncate(attr.count as usize);
    Ok(programs)
}

/// Puts another program behind a link, in one step.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr { link: raw(link), program: raw(program), ..Default::default() };
    // SAFETY: no pointers.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detaches a link for everybody, pinned or not.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr { link: raw(link), ..Default::default() };
    // SAFETY: no pointers.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// Reads one value into `value`, whose length is the map's value size (times CPUs for per-CPU maps); false if the key is missing.
pub fn map_lookup<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &mut [V]) -> io::Result<bool> {
    let mut attr = ElementAttr {
        map: raw(map),
        key: &raw const *key as u64,
        value: value.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: key and value are live, plain bytes, and sized as the map (checked when it was opened).
    found(unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) })
}

/// Inserts or replaces one entry.
pub fn map_update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    map_update_slice(map, key, std::slice::from_ref(value))
}

/// Inserts one entry; false if its key is there already.
pub fn map_insert<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<bool> {
    const BPF_NOEXIST: u64 = 1;
    let mut attr = ElementAttr {
        map: raw(map),
        key: &raw const *key as u64,
        value: &raw const *value as u64,
        flags: BPF_NOEXIST,
        ..Default::default()
    };
    // SAFETY: as in `map_lookup`.
    match unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Replaces one entry; false if its key is missing.
pub fn map_replace<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<bool> {
    const BPF_EXIST: u64 = 2;
    let mut attr = ElementAttr {
        map: raw(map),
        key: &raw const *key as u64,
        value: &raw const *value as u64,
        flags: BPF_EXIST,
        ..Default::default()
    };
    // SAFETY: as in `map_lookup`.
    found(unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) })
}

/// Inserts or replaces one entry whose value has several parts: one for each CPU.
pub fn map_update_slice<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &[V]) -> io::Result<()> {
    let mut attr =
        ElementAttr { map: raw(map), key: &raw const *key as u64, value: address(value), ..Default::default() };
    // SAFETY: as in `map_lookup`.
    unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// Removes one entry; false if there was none.
pub fn map_delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = ElementAttr { map: raw(map), key: &raw const *key as u64, ..Default::default() };
    // SAFETY: as in `map_lookup`.
    found(unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) })
}

fn found(result: io::Result<i64>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Inserts or replaces entries in one call. The error carries how many were done before it.
pub fn map_update_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), (usize, io::Error)> {
    assert_eq!(keys.len(), values.len());
    let mut attr = BatchAttr {
        keys: address(keys),
        values: address(values),
        count: keys.len() as u32,
        map: raw(map),
        ..Default::default()
    };
    // SAFETY: both slices hold `count` plain elements, sized as the map (checked when it was opened).
    batch(unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr) }, &attr)
}

/// Removes entries in one call. The error carries how many were done before it; the first missing key is such an error.
pub fn map_delete_batch<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> Result<(), (usize, io::Error)> {
    let mut attr = BatchAttr { keys: address(keys), count: keys.len() as u32, map: raw(map), ..Default::default() };
    // SAFETY: the slice holds `count` plain keys, sized as the map.
    batch(unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_BATCH, &mut attr) }, &attr)
}

fn batch(result: io::Result<i64>, attr: &BatchAttr) -> Result<(), (usize, io::Error)> {
    result.map(drop).map_err(|error| (attr.count as usize, error))
}

/// Position of a batched walk through a map; opaque to all but the kernel.
#[derive(Clone, Copy, Default)]
pub struct Cursor {
    /// Hash maps keep a bucket number here, others a key.
    token: [u64; 4],
    started: bool,
}

/// Entries of one batched look-up.
pub struct Batch {
    /// How many entries were written to the front of the buffers.
    pub count: usize,
    /// The walk is over.
    pub done: bool,
}

/// Copies the next entries of a map into `keys` and `values`, at most as many as there are keys. `values` has room for
/// each key's value, in a per-CPU map for one of each CPU.
///
/// A bucket that does not fit whole is ENOSPC: the caller retries with larger buffers from the same cursor.
pub fn map_lookup_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: &mut [K],
    values: &mut [V],
) -> io::Result<Batch> {
    assert!(values.len() >= keys.len());
    // SAFETY: the buffers hold as many plain elements as there are keys, sized as the map.
    unsafe { lookup_batch(map, cursor, keys.len(), keys.as_mut_ptr().cast(), values.as_mut_ptr().cast()) }
}

/// The same for a map whose records have no type here: `key_size` and `value_size` as the kernel says they are.
pub fn map_lookup_batch_bytes(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    (key_size, keys): (usize, &mut [u8]),
    (value_size, values): (usize, &mut [u8]),
) -> io::Result<Batch> {
    let count = keys.len() / key_size;
    assert!(values.len() >= count * value_size);
    // SAFETY: the buffers hold `count` elements of the map's own sizes.
    unsafe { lookup_batch(map, cursor, count, keys.as_mut_ptr(), values.as_mut_ptr()) }
}

/// # Safety
/// `keys` and `values` have room for `count` keys and values of the map.
unsafe fn lookup_batch(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    count: usize,
    keys: *mut u8,
    values: *mut u8,
) -> io::Result<Batch> {
    let mut next = [0; 4];
    let mut attr = BatchAttr {
        in_batch: if cursor.started { &raw const cursor.token as u64 } else { 0 },
        out_batch: &raw mut next as u64,
        keys: keys as u64,
        values: values as u64,
        count: count as u32,
        map: raw(map),
        ..Default::default()
    };
    // SAFETY: the caller's promise; a token has four bytes, or those of a key, of which none that is walked has more than a cursor.
    let done = match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) } {
        Ok(_) => false,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    *cursor = Cursor { token: next, started: true };
    Ok(Batch { count: attr.count as usize, done })
}

/// Returns once every BPF program that ran when it was called has ended.
///
/// membarrier(2) with `MEMBARRIER_CMD_GLOBAL` waits for one RCU grace period; programs run inside RCU read sections.
/// It is refused (EINVAL) on kernels booted with `nohz_full`.
pub fn wait_for_programs() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// SO_NETNS_COOKIE of the calling thread's network namespace.
pub fn netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    // Any socket belongs to a namespace; a UNIX one needs no address family to be up.
    let socket = OwnedFd::from(std::os::unix::net::UnixDatagram::unbound()?);
    socket_number(socket.as_fd(), SO_NETNS_COOKIE)
}

/// Moves the calling thread into a network namespace of its own, which ends with it.
pub fn leave_netns() -> io::Result<()> {
    // SAFETY: no pointers.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// True if `path` lies on a BPF file system.
pub fn is_bpffs(path: &Path) -> io::Result<bool> {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    let path = c_path(path)?;
    // SAFETY: statfs is integers only; zero is a value.
    let mut info: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are live.
    if unsafe { libc::statfs(path.as_ptr(), &mut info) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info.f_type as i64 == BPF_FS_MAGIC)
}

/// Mounts a BPF file system.
pub fn mount_bpffs(path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: three strings that end in zero; no data.
    let result =
        unsafe { libc::mount(c"bpf".as_ptr(), path.as_ptr(), c"bpf".as_ptr(), 0, c"mode=0700".as_ptr().cast()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Unmounts a file system.
pub fn unmount(path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: a string that ends in zero.
    if unsafe { libc::umount2(path.as_ptr(), libc::UMOUNT_NOFOLLOW) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Fills `bytes` from the kernel's random source.
pub fn random(bytes: &mut [u8]) -> io::Result<()> {
    // SAFETY: a live buffer and its length.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if count != bytes.len() as isize { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Now, by CLOCK_MONOTONIC: the clock of `bpf_ktime_get_ns`.
pub fn monotonic() -> std::time::Duration {
    // SAFETY: timespec is integers only.
    let mut now: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: `now` is live; the clock exists on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    std::time::Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Gives freed heap memory back to the kernel, where the C library can.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no arguments that matter.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Moves the calling thread, and no other, to a network namespace.
pub fn enter_netns(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers.
    let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A handle of a process.
pub fn open_process(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, id, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A duplicate of another process's descriptor.
pub fn take_descriptor(process: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// SO_COOKIE of a socket.
pub fn socket_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    socket_number(socket, libc::SO_COOKIE)
}

fn socket_number(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<u64> {
    let mut number = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `number` and `length` are live and agree in size.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut number).cast(), &mut length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(number) }
}

/// A netlink socket to the calling thread's network namespace.
pub struct NetlinkSocket(OwnedFd);

impl NetlinkSocket {
    /// A fresh one, for a `NETLINK_` family.
    pub fn open(family: libc::c_int) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, family) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends messages to the kernel.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: a live buffer and its length.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits for messages of the kernel; bytes written to the front of `buffer`.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: a live buffer and its length.
        let received = unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        if received < 0 { Err(io::Error::last_os_error()) } else { Ok(received as usize) }
    }
}

/// Has all threads share one heap that grows in small steps, where the C library can. To be called before threads are started.
///
/// By default each thread gets a heap of its own, and what a source's thread frees after a first list is of no use to the
/// reconciler's, so that the resident memory grows by about the first list.
pub fn share_heap() {
    #[cfg(target_env = "gnu")]
    {
        /// Bytes by which the heap grows and shrinks beyond what is asked for.
        const STEP: libc::c_int = 64 << 10;
        // SAFETY: parameters of the allocator; a refused one is left as it was.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1);
            libc::mallopt(libc::M_TOP_PAD, STEP);
        }
    }
}

/// A memory-mapped array: stretches of `stride` bytes, read and written as words.
pub struct MappedWords {
    words: *mut std::sync::atomic::AtomicU64,
    count: usize,
}

// SAFETY: the mapping is shared memory that is touched by atomic operations only.
unsafe impl Send for MappedWords {}
// SAFETY: as above.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// Maps `bytes` (rounded up to pages by the kernel) of an array made with BPF_F_MMAPABLE.
    pub fn map(array: BorrowedFd<'_>, bytes: usize, writable: bool) -> io::Result<Self> {
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, array.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { words: start.cast(), count: bytes / 8 })
    }

    /// All words.
    pub fn words(&self) -> &[std::sync::atomic::AtomicU64] {
        // SAFETY: the mapping starts on a page, is `count` words long and lives as long as `self`; every access is atomic.
        unsafe { std::slice::from_raw_parts(self.words, self.count) }
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped; no reference outlives `self`.
        unsafe { libc::munmap(self.words.cast(), self.count * 8) };
    }
}

/// Opens a directory for use as a descriptor.
pub fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let file = File::open(path)?;
    if !file.metadata()?.is_dir() {
        return Err(io::Error::from(io::ErrorKind::NotADirectory));
    }
    Ok(file.into())
}

/// A duplicate of a descriptor.
pub fn duplicate(fd: impl AsFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}

/// True if a process has the file open for writing. Asked by a lease, which the kernel refuses then; other errors: it cannot be
/// known (not our file, a file system without leases).
pub fn has_writer(file: &File) -> io::Result<bool> {
    /// include/uapi/asm-generic/fcntl.h; `libc` lacks it.
    const F_SETSIG: libc::c_int = 10;
    let set = |command: libc::c_int, value: libc::c_int| {
        // SAFETY: the descriptor is open for as long as `file` is borrowed; the commands take a number.
        match unsafe { libc::fcntl(file.as_raw_fd(), command, value) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // Who opens it just now makes the kernel tell us; by default with a signal that ends the process, with this one it is
    // ignored.
    set(F_SETSIG, libc::SIGURG)?;
    match set(libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(()) => set(libc::F_SETLEASE, libc::F_UNLCK).map(|()| false),
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(true),
        Err(error) => Err(error),
    }
}
