//! Every map. Sizes marked "set at load" follow the agent's flags (`--max-services`, `--max-backends`, `--max-flows`).

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SkStorage};
use aya_ebpf::macros::btf_map;
use proxy_common::abi::address::{AddressClass, KEPT_WORDS, PORT_WORDS, PortWord};
use proxy_common::abi::affinity::{AffinityKey, AffinityValue};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::Config;
use proxy_common::abi::counter::ServiceCounters;
use proxy_common::abi::device::DeviceRecord;
use proxy_common::abi::event::{EventRecord, Watch};
use proxy_common::abi::flow::{FlowKey, FlowValue};
use proxy_common::abi::fragment::{FragmentKey, FragmentValue};
use proxy_common::abi::frontend::{FrontendKey, FrontendValue};
use proxy_common::abi::service::{ServiceName, ServiceRecord, Slot};
use proxy_common::abi::socket::{SocketEntry, SocketTable};
use proxy_common::abi::source::SourceRange;
use proxy_common::addr::Addr;
use proxy_common::lb::packet::Target;
use proxy_common::wire::Parsed;

const MAPPED: usize = BPF_F_MMAPABLE as usize;
const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

/// The node's configuration.
#[btf_map]
pub static config: Array<Config, 1> = Array::new();

/// Destination classes. Set at load: frontends, backends and addresses of the node together.
#[btf_map]
pub static addresses: HashMap<Addr, AddressClass, 262_144, ON_DEMAND> = HashMap::new();

/// Uses of this node's ports, written by the agent.
#[btf_map]
pub static ports: Array<PortWord, { PORT_WORDS as usize }> = Array::new();

/// What the programs add to `ports`: ports outside the agent's range that carry a rewritten source, NodePorts that have
/// flows. The last word is the generation, see [`KEPT_WORDS`].
#[btf_map]
pub static kept_ports: Array<PortWord, { KEPT_WORDS as usize + 1 }, MAPPED> = Array::new();

/// Frontends. Set at load.
#[btf_map]
pub static frontends: HashMap<FrontendKey, FrontendValue, 131_072, ON_DEMAND> = HashMap::new();

/// Who may dial the restricted frontends of a service; the value is 1.
#[btf_map]
pub static source_ranges: LpmTrie<SourceRange, u32, 65_536> = LpmTrie::new();

/// Service records. Set at load.
#[btf_map]
pub static services: Array<ServiceRecord, 65_536, MAPPED> = Array::new();

/// Names of service ids, for the agent. Set at load.
#[btf_map]
pub static service_names: HashMap<u32, ServiceName, 65_536, ON_DEMAND> = HashMap::new();

/// Slots of all sets. Set at load.
#[btf_map]
pub static slots: Array<Slot, 1_048_576, MAPPED> = Array::new();

/// Backends. Set at load.
#[btf_map]
pub static backends: Array<BackendRecord, 262_144, MAPPED> = Array::new();

/// Flows whose return path is not proven yet: a flood can only push out its like. Preallocated, about 160 bytes an entry.
#[btf_map]
pub static flows_pending: LruHashMap<FlowKey, FlowValue, 262_144> = LruHashMap::new();

/// Proven flows, two or three entries each; never evicted. Set at load; 16 bytes an entry at once, the rest on demand.
#[btf_map]
pub static flows: HashMap<FlowKey, FlowValue, 1_048_576, ON_DEMAND> = HashMap::new();

/// What a dry run changes about `flows_pending` and `flows`: see `dry_run`. Empty where no dry run is made.
#[btf_map]
pub static dry_flows_pending: HashMap<FlowKey, FlowValue, 4_096, ON_DEMAND> = HashMap::new();

/// Likewise.
#[btf_map]
pub static dry_flows: HashMap<FlowKey, FlowValue, 4_096, ON_DEMAND> = HashMap::new();

/// Which backend a client had last.
#[btf_map]
pub static affinity: LruHashMap<AffinityKey, AffinityValue, 65_536> = LruHashMap::new();

/// Ports of fragmented packets.
#[btf_map]
pub static fragments: LruHashMap<FragmentKey, FragmentValue, 8_192> = LruHashMap::new();

/// Bridge ports.
#[btf_map]
pub static devices: HashMap<u32, DeviceRecord, 4_096, ON_DEMAND> = HashMap::new();

/// Traffic of services. Set at load.
#[btf_map]
pub static service_counters: PerCpuArray<ServiceCounters, 65_536> = PerCpuArray::new();

/// Drops by reason.
#[btf_map]
pub static drop_counters: PerCpuArray<u64, 16> = PerCpuArray::new();

/// Answers sent in the current second, to limit their rate.
#[btf_map]
pub static answers: PerCpuArray<[u32; 2], 1> = PerCpuArray::new();

/// Who watches what happens, and what of it.
#[btf_map]
pub static watch: Array<Watch, 1> = Array::new();

/// What happens, while somebody watches: some 2,000 events.
#[btf_map]
pub static events: RingBuf<EventRecord, 262_144> = RingBuf::new();

/// Room for the flow entry that is being made: it would not fit on the stack.
#[btf_map]
pub static drafts: PerCpuArray<FlowValue, 1> = PerCpuArray::new();

/// Room for a parsed packet, likewise. (Plain words: the kernel takes no type information of a Rust union.)
#[btf_map]
pub static parsed_packets: PerCpuArray<Words<PARSED>, 1> = PerCpuArray::new();

/// Room for the place a new flow goes to, likewise.
#[btf_map]
pub static targets: PerCpuArray<Words<TARGET>, 1> = PerCpuArray::new();

type Words<const N: usize> = [u64; N];
const PARSED: usize = size_of::<Parsed>().div_ceil(8);
const TARGET: usize = size_of::<Target>().div_ceil(8);

/// The translation of a connected socket.
#[btf_map]
pub static sockets: SkStorage<SocketEntry> = SkStorage::new();

/// The translations of an unconnected UDP socket.
#[btf_map]
pub static sockets_udp: SkStorage<SocketTable> = SkStorage::new();
