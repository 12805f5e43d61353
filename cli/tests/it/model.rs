//! Generates checkpoints of any size and storage format from those of fixtures/.

use safetensors::Dtype;
use serde_json::Value;

use crate::common::{Folder, Stored};

/// A checkpoint in one file.
#[derive(Clone)]
pub struct Model {
    pub config: Value,
    pub tensors: Vec<Stored>,
    hidden: usize,
    random: u64,
}

impl Model {
    /// The layer of a fixture with other sizes and random values. `sizes` are pairs of an old and a
    /// new size; the first pair is the hidden size.
    pub fn of(fixture: &str, sizes: &[(usize, usize)]) -> Self {
        let folder = Folder::of(fixture);
        let config = std::fs::read_to_string(folder.path("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&config).unwrap();
        let new = |old: usize| sizes.iter().find(|(size, _)| *size == old).map_or(old, |it| it.1);
        const KEYS: [&str; 4] = [
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
        ];
        let nested = config.get("text_config").is_some();
        let object = if nested { &mut config["text_config"] } else { &mut config };
        for key in KEYS {
            if let Some(old) = object.get(key).and_then(Value::as_u64) {
                object[key] = Value::from(new(old as usize));
            }
        }
        let tensors = folder.tensors("model.safetensors");
        let mut model = Self { config, tensors: vec![], hidden: new(sizes[0].0), random: 1 };
        for tensor in tensors {
            let shape: Vec<usize> = tensor.shape.iter().map(|size| new(*size)).collect();
            let values = model.numbers(shape.iter().product(), 0.5);
            model.tensors.push(Stored::f32(&tensor.name, &shape, &values));
        }
        model
    }

    fn next(&mut self) -> u64 {
        self.random =
            self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.random >> 33
    }

    /// Random values from `-size` to `size`.
    pub fn numbers(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| (self.next() as f32 / (1u64 << 30) as f32 - 1.0) * size).collect()
    }

    /// Random bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| (self.next() >> 8) as u8).collect()
    }

    /// Replaces each tensor with `part` in its name by the tensors that `store` returns for its
    /// name and shape.
    pub fn store(
        &mut self,
        part: &str,
        mut store: impl FnMut(&mut Self, &str, &[usize]) -> Vec<Stored>,
    ) {
        for tensor in std::mem::take(&mut self.tensors) {
            let stored = match tensor.name.contains(part) {
                true => store(self, &tensor.name, &tensor.shape),
                false => vec![tensor],
            };
            self.tensors.extend(stored);
        }
    }

    /// A folder with the checkpoint, and tokens in recorded.safetensors.
    pub fn write(&self) -> Folder {
        let folder = Folder::new();
        std::fs::write(folder.path("config.json"), self.config.to_string()).unwrap();
        crate::common::write(&folder.path("model.safetensors"), &self.tensors);
        let x: Vec<f32> =
            (0..5 * self.hidden).map(|i| ((i * 7919 % 101) as f32 - 50.0) / 25.0).collect();
        crate::common::write(
            &folder.path("recorded.safetensors"),
            &[Stored::f32("x", &[5, self.hidden], &x)],
        );
        folder
    }
}

/// A tensor of bytes.
pub fn bytes(name: &str, dtype: Dtype, shape: &[usize], data: Vec<u8>) -> Stored {
    Stored { name: name.into(), dtype, shape: shape.into(), data }
}

/// A tensor of zeros.
pub fn zeros(name: &str, dtype: Dtype, shape: &[usize]) -> Stored {
    bytes(name, dtype, shape, vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8])
}
