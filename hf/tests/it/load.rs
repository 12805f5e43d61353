//! Checkpoints: blocks of every fixture are loaded, and their errors are typed.

use std::sync::Mutex;

use half::bf16;
use moe_kernels_hf::{Checkpoint, Error, Role, TensorFile};

use crate::fixtures::{fixture, fixtures};

/// Every checkpoint of fixtures/ opens. Its arrays have the length of their shape, and their
/// elements are written.
#[test]
fn every_fixture_loads() {
    for folder in fixtures() {
        let name = folder.display().to_string();
        let recorded = TensorFile::open(&folder.join("recorded.safetensors")).unwrap();
        let layer = recorded.note("layer").unwrap().parse().unwrap();
        let checkpoint = Checkpoint::open(folder).unwrap();
        assert!(checkpoint.layers().unwrap().contains(&layer), "{name}");
        for block in checkpoint.blocks(layer).unwrap() {
            for array in block.arrays().filter(|array| array.role != Role::Table) {
                let wide = block.read::<f32>(array.role).unwrap().unwrap();
                let len = array.shape.iter().product::<usize>();
                assert_eq!(wide.len(), len, "{name}: {:?}", array.role);
                let written = wide.iter().filter(|value| value.is_finite() && **value != 0.0);
                assert!(written.count() * 4 > 3 * wide.len(), "{name}: {:?}", array.role);
                let narrow = block.read::<bf16>(array.role).unwrap().unwrap();
                let rounded = wide.iter().map(|value| bf16::from_f32(*value));
                assert!(rounded.eq(narrow), "{name}: {:?} in bf16", array.role);
            }
            let seen = Mutex::new(Vec::new());
            let loaded = block.load_with::<f32>(|done, total| {
                assert_eq!(total, block.num_parts());
                seen.lock().unwrap().push(done);
            });
            let loaded = loaded.unwrap();
            assert_eq!(loaded.weights.experts.down.len(), block.config().down_len(), "{name}");
            assert_eq!(loaded.warning(), None, "{name}");
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(1..=block.num_parts()), "{name}");
        }
    }
}

/// A block outlives its checkpoint, and a layer may have a text and a vision block.
#[test]
fn a_layer_may_have_two_blocks() {
    let blocks = Checkpoint::open(fixture("ernie4-5-vl-moe-tiny")).unwrap().blocks(1).unwrap();
    let parts: Vec<_> = blocks.iter().map(|block| block.info().part).collect();
    assert_eq!(parts, ["text", "vision"]);
    for block in blocks {
        block.load::<f32>().unwrap();
    }
}

#[test]
fn errors_are_typed() {
    let no_folder = Checkpoint::open(fixture("no-such-folder")).unwrap_err();
    assert!(matches!(no_folder, Error::File { .. }), "{no_folder:?}");
    let checkpoint = Checkpoint::open(fixture("mixtral-tiny")).unwrap();
    let no_layer = checkpoint.blocks(9).unwrap_err();
    assert!(matches!(no_layer, Error::File { .. }), "{no_layer:?}");
    let no_file = TensorFile::open(&fixture("no-such-file")).unwrap_err();
    assert!(matches!(no_file, Error::Io { .. }), "{no_file:?}");
    let recorded = TensorFile::open(&fixture("mixtral-tiny/recorded.safetensors")).unwrap();
    let shape = recorded.tensor("x").unwrap().check(&[1, 1]).unwrap_err();
    assert!(matches!(shape, Error::Tensor { .. }), "{shape:?}");
    let no_tensor = recorded.tensor("z").unwrap_err();
    assert!(matches!(no_tensor, Error::File { .. }), "{no_tensor:?}");
}
