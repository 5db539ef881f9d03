//! Values of single fields: addresses, prefixes, ports, names.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use proxy_common::addr::{Addr, Port};

use super::FieldError;
use crate::model::Protocol;

/// Longest name of an object (RFC 1123 subdomain, what Kubernetes allows at most).
pub const NAME_LIMIT: usize = 253;

/// Refuses a name that is empty, too long, or could not be told apart from its surroundings in the tables.
pub fn check_name(field: &str, name: &str) -> Result<(), FieldError> {
    if name.is_empty() {
        return Err(FieldError::new(field, "is empty"));
    }
    check_part(field, name)
}

/// The same for a name that may be empty.
pub fn check_part(field: &str, name: &str) -> Result<(), FieldError> {
    if name.len() > NAME_LIMIT {
        return Err(FieldError::new(field, format!("is {} bytes long, a name has at most {NAME_LIMIT}", name.len())));
    }
    let unusable = |c: &char| matches!(c, '/' | ':') || c.is_whitespace() || c.is_control();
    match name.chars().find(unusable) {
        Some(c) => Err(FieldError::new(field, format!("contains {c:?}, which no name may"))),
        None => Ok(()),
    }
}

/// An IP address as Kubernetes reads it: leading zeros in IPv4 are decimal zeros, IPv4-mapped IPv6 is IPv4.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    match text.parse::<IpAddr>() {
        Ok(addr) => Some(addr.to_canonical()),
        Err(_) => parse_sloppy_v4(text).map(IpAddr::V4),
    }
}

fn parse_sloppy_v4(text: &str) -> Option<Ipv4Addr> {
    let octet = |part: &str| -> Option<u8> {
        let is_number = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let significant = part.trim_start_matches('0');
        is_number.then_some(if significant.is_empty() { "0" } else { significant })?.parse().ok()
    };
    let octets: Vec<u8> = text.split('.').map(octet).collect::<Option<_>>()?;
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?))
}

/// An address that packets to one receiver can have, or what is wrong with it.
pub fn parse_unicast(text: &str) -> Result<Addr, String> {
    let Some(ip) = parse_ip(text) else { return Err(format!("{text:?} is not an IP address")) };
    let addr = Addr::from(ip);
    let why = if ip.is_unspecified() {
        "unspecified"
    } else if addr.is_loopback() {
        "a loopback address"
    } else if addr.is_multicast_or_broadcast() {
        "a multicast or broadcast address"
    } else if addr.is_v6_link_local() {
        "link-local"
    } else {
        return Ok(addr);
    };
    Err(format!("{text} is {why}, which no service or endpoint can have"))
}

/// A prefix with its host bits cleared, or what is wrong with it.
pub fn parse_cidr(text: &str) -> Result<IpNet, String> {
    let wrong = || format!("{text:?} is not an address prefix such as 10.96.0.0/16");
    let (addr, length) = text.trim().split_once('/').ok_or_else(wrong)?;
    let (addr, is_v6) = (parse_ip(addr).ok_or_else(wrong)?, addr.contains(':'));
    if is_v6 && addr.is_ipv4() {
        return Err(format!("{text:?} is an IPv4 prefix in the form of IPv6; write it as IPv4"));
    }
    let length = length.parse().map_err(|_| wrong())?;
    Ok(IpNet::new(addr, length).map_err(|_| wrong())?.trunc())
}

/// A port, not 0.
pub fn parse_port(field: &str, number: i64) -> Result<Port, FieldError> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(Port(port)),
        _ => Err(FieldError::new(field, format!("{number} is not a port: ports are 1 to 65535"))),
    }
}

/// A protocol; TCP if there is none.
pub fn parse_protocol(field: &str, name: Option<&str>) -> Result<Protocol, FieldError> {
    match name.unwrap_or("TCP") {
        "TCP" | "" => Ok(Protocol::Tcp),
        "UDP" => Ok(Protocol::Udp),
        "SCTP" => Ok(Protocol::Sctp),
        other => Err(FieldError::new(field, format!("{other:?} is none of TCP, UDP, SCTP"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_zeros_are_decimal() {
        let cases = [
            ("172.30.0.041", Some("172.30.0.41")),
            ("010.0.0.1", Some("10.0.0.1")),
            ("000.0.0.00001", Some("0.0.0.1")),
            ("10.0.0.256", None),
            ("10.0.0.0300", None),
            ("10.0.0", None),
            ("10.0.0.", None),
            ("10.0.0.+1", None),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("fd00::1", Some("fd00::1")),
            ("web", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_ip(text), expected.map(|ip| ip.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn addresses_that_no_packet_can_have_are_refused() {
        for text in ["0.0.0.0", "::", "127.0.0.1", "::1", "224.0.0.1", "255.255.255.255", "ff02::1", "fe80::1", ""] {
            assert!(parse_unicast(text).is_err(), "{text}");
        }
        assert!(parse_unicast("169.254.20.10").is_ok());
    }

    #[test]
    fn prefixes_lose_their_host_bits() {
        assert_eq!(parse_cidr(" 10.96.3.4/16 ").unwrap().to_string(), "10.96.0.0/16");
        assert_eq!(parse_cidr("fd00::1/64").unwrap().to_string(), "fd00::/64");
        for text in ["10.96.0.0", "10.96.0.0/33", "10.96.0.0/-1", "x/8", "", "::ffff:10.0.0.0/104"] {
            assert!(parse_cidr(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_that_would_break_the_text_form_are_refused() {
        for name in ["a/b", "a:b", "a b", "a\n", ""] {
            assert!(check_name("metadata.name", name).is_err(), "{name:?}");
        }
        let error = check_name("metadata.name", &"x".repeat(300)).unwrap_err();
        assert_eq!(error.to_string(), "metadata.name: is 300 bytes long, a name has at most 253");
    }
}
