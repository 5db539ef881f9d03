//! `cargo xtask bench`: the table of what Shunt costs, as ratios within one run. `--help` tells what can be chosen.

fn main() {
    shunt_tests::bench::main();
}
