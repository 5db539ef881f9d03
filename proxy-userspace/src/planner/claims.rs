//! Who owns a frontend that several services claim.
