//! src/abi.rs is bindgen's output for kernels/abi.h.
//!
//! After a change of abi.h: `MOE_UPDATE=1 cargo test --features bindgen --test it abi`.

#[test]
fn the_committed_copy_is_current() {
    let fresh = include_str!(concat!(env!("OUT_DIR"), "/abi.rs"));
    let committed = concat!(env!("CARGO_MANIFEST_DIR"), "/src/abi.rs");
    if std::env::var_os("MOE_UPDATE").is_some() {
        std::fs::write(committed, fresh).unwrap();
    }
    let committed = std::fs::read_to_string(committed).unwrap();
    assert_eq!(committed, fresh, "src/abi.rs is stale; tests/it/abi.rs says how to refresh it");
}
