//! Microbenchmarks, one module per operation, on the device that MOE_DEVICE names.
//!
//! `cargo bench -- permute` runs one operation. On the software device the times say how fast the
//! emulation is and nothing about a GPU.

mod combine;
mod common;
mod grouped_gemm;
mod layer;
mod permute;
mod plan;
mod route;

criterion::criterion_group!(
    benches,
    route::bench,
    plan::bench,
    permute::bench,
    grouped_gemm::bench,
    combine::bench,
    layer::bench,
);
criterion::criterion_main!(benches);
