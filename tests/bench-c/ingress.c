// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
/*
 * The ingress hot path written in C, over the same tables: what `cargo xtask bench` sets the Rust program beside. Built by
 * the bench with any clang that has a BPF target; never part of the agent.
 *
 * It does what proxy-common's `ingress_known` decides and proxy-ebpf's `ingress` carries out for a packet in the middle of
 * an established flow, and for one that is not ours, with the same helpers: both IP families, VLAN tags, IPv4 options, fragments,
 * TCP and UDP; look-ups of destination class, port use, snat and front entries; the same rewrite, the same counters.
 * What that path hands on to other programs (packets that open or end a flow, ICMP errors, IPv6 extension headers, bridge
 * ports) passes here.
 */
#include <linux/bpf.h>

#define SEC(name) __attribute__((section(name), used))
#define always_inline inline __attribute__((always_inline))
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name
#define PIN_BY_NAME 1
#define NEXT (-1)
#define SHOT 2
#define htons(x) __builtin_bswap16(x)

static void *(*lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*store_bytes)(void *skb, __u32 offset, const void *from, __u32 len, __u64 flags) =
	(void *)BPF_FUNC_skb_store_bytes;
static long (*l3_csum)(void *skb, __u32 offset, __u64 from, __u64 to, __u64 flags) = (void *)BPF_FUNC_l3_csum_replace;
static long (*l4_csum)(void *skb, __u32 offset, __u64 from, __u64 to, __u64 flags) = (void *)BPF_FUNC_l4_csum_replace;

/* proxy-common/src/abi */
struct addr { __u32 word[4]; };
struct flow_key { struct addr a, b; __u16 a_port, b_port; __u8 proto, kind; __u16 reserved; };
struct flow {
	__u64 hot, proof;
	struct addr peer, nat;
	__u16 peer_port, nat_port, alias_port, mac[3];
	__u32 service, backend, ifindex, flags, reserved;
};
struct backend { struct addr addr; __u16 port; __u8 proto, state; __u32 flags; };
struct counters { __u64 flows, sockets, packets, bytes, no_backend; };
_Static_assert(sizeof(struct flow_key) == 40 && sizeof(struct flow) == 80 && sizeof(struct backend) == 24, "the ABI");

enum { FRONT = 1, SNAT = 3 };
enum { C_FRONTEND = 1, C_NODE = 4, C_BACKEND = 16, C_FLOWS = 32 };
enum { P_NODE_PORT = 1, P_SNAT = 2 };
enum { F_DIRECT = 4, F_WANTS_MAC = 16 };
enum { FIN = 1, SYN = 2, RST = 4 };

struct { __uint(type, BPF_MAP_TYPE_HASH); __type(key, struct addr); __type(value, __u32);
	 __uint(max_entries, 1); __uint(map_flags, BPF_F_NO_PREALLOC); __uint(pinning, PIN_BY_NAME); } addresses SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __type(key, struct flow_key); __type(value, struct flow);
	 __uint(max_entries, 1); __uint(map_flags, BPF_F_NO_PREALLOC); __uint(pinning, PIN_BY_NAME); } flows SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __type(key, __u32); __type(value, __u64);
	 __uint(max_entries, 2048); __uint(pinning, PIN_BY_NAME); } ports SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __type(key, __u32); __type(value, __u64);
	 __uint(max_entries, 2048); __uint(pinning, PIN_BY_NAME); } kept_ports SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __type(key, __u32); __type(value, struct backend);
	 __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE); __uint(pinning, PIN_BY_NAME); } backends SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __type(key, __u32); __type(value, struct counters);
	 __uint(max_entries, 1); __uint(pinning, PIN_BY_NAME); } service_counters SEC(".maps");

struct packet { struct flow_key key; __u32 l3, l4; __u8 tcp_flags, is_v6; };

static always_inline int parse(struct __sk_buff *skb, struct packet *p)
{
	char *start = (char *)(long)skb->data, *end = (char *)(long)skb->data_end;
	__u32 l3 = 14;
	__u8 *l4;
	__u16 type;

	if (start + 14 > end)
		return 0;
	type = *(__u16 *)(start + 12);
#pragma unroll
	for (int tag = 0; tag < 2; tag++)
		if (type == htons(0x8100) || type == htons(0x88a8)) {
			if (start + l3 + 4 > end)
				return 0;
			type = *(__u16 *)(start + l3 + 2);
			l3 += 4;
		}
	p->l3 = l3;
	if (type == htons(0x0800)) {
		__u8 *ip = (__u8 *)start + l3;

		if ((char *)ip + 20 > end || ip[0] >> 4 != 4 || (ip[0] & 15) < 5)
			return 0;
		if (*(__u16 *)(ip + 6) & htons(0x3fff))
			return 0;
		p->key.a = (struct addr){ { 0, 0, htons(0xffff) << 16, *(__u32 *)(ip + 12) } };
		p->key.b = (struct addr){ { 0, 0, htons(0xffff) << 16, *(__u32 *)(ip + 16) } };
		p->key.proto = ip[9];
		p->l4 = l3 + (ip[0] & 15) * 4;
		p->is_v6 = 0;
	} else if (type == htons(0x86dd)) {
		__u8 *ip = (__u8 *)start + l3;

		if ((char *)ip + 40 > end || ip[0] >> 4 != 6)
			return 0;
		p->key.a = *(struct addr *)(ip + 8);
		p->key.b = *(struct addr *)(ip + 24);
		p->key.proto = ip[6];
		p->l4 = l3 + 40;
		p->is_v6 = 1;
	} else {
		return 0;
	}
	/* One pointer for all reads: the verifier follows its bounds, not those of a sum made twice. */
	l4 = (__u8 *)start + p->l4;
	if (p->key.proto == 6) {
		if ((char *)l4 + 20 > end)
			return 0;
		p->tcp_flags = l4[13];
	} else if (p->key.proto == 17) {
		if ((char *)l4 + 8 > end)
			return 0;
		p->tcp_flags = 0;
	} else {
		return 0;
	}
	p->key.a_port = *(__u16 *)l4;
	p->key.b_port = *(__u16 *)(l4 + 2);
	p->key.reserved = 0;
	return 1;
}

static always_inline __u64 diff(__u64 sum, __u32 old, __u32 new)
{
	return sum + (__u32)~old + new;
}

static always_inline __u32 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (__u32)sum + (sum >> 32);
}

static always_inline int translate(struct __sk_buff *skb, struct packet *p, struct flow *f)
{
	__u32 l4_sum = p->l4 + (p->key.proto == 6 ? 16 : 6), addrs, ports;
	__u64 udp = p->key.proto == 17 ? BPF_F_MARK_MANGLED_0 : 0, sum = 0;
	struct counters *counters;
	__u16 port = f->peer_port, alias = f->alias_port;
	__u32 service = f->service;

#pragma unroll
	for (int i = 0; i < 4; i++)
		sum = diff(sum, p->key.b.word[i], f->peer.word[i]);
	addrs = fold(sum);
	sum = diff(0, p->key.b_port, port);
	if (alias)
		sum = diff(sum, p->key.a_port, alias);
	ports = fold(sum);
	if (f->mac[0] | f->mac[1] | f->mac[2])
		if (store_bytes(skb, 0, f->mac, 6, 0))
			return SHOT;
	if (l4_csum(skb, l4_sum, 0, addrs, udp | BPF_F_PSEUDO_HDR) || l4_csum(skb, l4_sum, 0, ports, udp) ||
	    store_bytes(skb, p->l4 + 2, &port, 2, 0))
		return SHOT;
	if (alias && store_bytes(skb, p->l4, &alias, 2, 0))
		return SHOT;
	if (p->is_v6) {
		if (store_bytes(skb, p->l3 + 24, &f->peer, 16, 0))
			return SHOT;
	} else if (l3_csum(skb, p->l3 + 10, 0, addrs, 0) || store_bytes(skb, p->l3 + 16, &f->peer.word[3], 4, 0)) {
		return SHOT;
	}
	counters = lookup(&service_counters, &service);
	if (counters) {
		counters->packets += 1;
		counters->bytes += skb->len;
	}
	return NEXT;
}

SEC("classifier") int ingress_in_c(struct __sk_buff *skb)
{
	struct packet p;
	struct flow *front;
	__u32 *found, class;
	__u64 uses = P_NODE_PORT | P_SNAT;

	if (skb->pkt_type != 0 || !parse(skb, &p))
		return NEXT;
	if (p.is_v6 ? (p.key.b.word[0] & 0xff) == 0xff : (p.key.b.word[3] & 0xf0) >= 0xe0)
		return NEXT;
	found = lookup(&addresses, &p.key.b);
	if (!found)
		return NEXT;
	class = *found;
	if (class & C_NODE) {
		__u32 port = htons(p.key.b_port), index = port >> 5;
		__u64 *word = lookup(&ports, &index), *kept = lookup(&kept_ports, &index);

		uses = ((word ? *word : 0) | (kept ? *kept : 0)) >> ((port & 31) << 1);
		if (uses & P_SNAT) {
			p.key.kind = SNAT;
			front = lookup(&flows, &p.key);
			if (front)
				return translate(skb, &p, front);
		}
	}
	if (!(class & (C_FRONTEND | C_FLOWS)) && !(class & C_NODE && uses & P_NODE_PORT))
		return NEXT;
	if (p.tcp_flags & (SYN | FIN | RST))
		return NEXT;
	p.key.kind = FRONT;
	front = lookup(&flows, &p.key);
	if (!front || front->flags & F_WANTS_MAC)
		return NEXT;
	if (front->flags & F_DIRECT && front->ifindex != skb->ifindex)
		return NEXT;
	if (p.key.proto == 17 && !(front->flags & F_DIRECT)) {
		__u32 id = front->backend;
		struct backend *backend = lookup(&backends, &id);

		if (!backend || !backend->state || backend->port != front->peer_port ||
		    __builtin_memcmp(&backend->addr, &front->peer, sizeof(struct addr)))
			return NEXT;
	}
	return translate(skb, &p, front);
}

/* The least that a program can do. */
SEC("classifier") int pass(struct __sk_buff *skb)
{
	return NEXT;
}

char _license[] SEC("license") = "Dual MIT/GPL";
