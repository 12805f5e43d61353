//! Experts in one FP8 tensor `[E, out, in]` with scales `[E, out / 128, in / 128]`, rounded up:
//! each value has the scale of its expert and block.

use safetensors::Dtype;

use crate::common::{Folder, Stored, run, write};

/// No width is a multiple of 128, and each has several blocks in one of the matrices.
const HIDDEN: usize = 136;
const INTERMEDIATE: usize = 130;
const EXPERTS: usize = 3;

/// Decodes E4M3: 4 bits of exponent with bias 7, 3 bits of fraction.
fn value(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        0 => fraction / 8.0 * 2f32.powi(-6),
        _ => (1.0 + fraction / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// A stack of matrices in FP8: codes, scales, and decoded values.
fn stack(name: &str, n: usize, k: usize, first: f32) -> [Stored; 3] {
    let (rows, columns) = (n.div_ceil(128), k.div_ceil(128));
    // Every exponent up to 2, both signs, no NaN.
    let codes: Vec<u8> = (0..EXPERTS * n * k)
        .map(|i| (i * 29 % 67) as u8 | if i % 3 == 0 { 0x80 } else { 0 })
        .collect();
    // Every block has a different scale.
    let scales: Vec<f32> = (0..EXPERTS * rows * columns).map(|i| first + 0.03 * i as f32).collect();
    let scale = |expert: usize, row: usize, column: usize| {
        scales[(expert * rows + row / 128) * columns + column / 128]
    };
    let mut numbers = Vec::with_capacity(codes.len());
    for (i, &code) in codes.iter().enumerate() {
        numbers.push(value(code) * scale(i / (n * k), i / k % n, i % k));
    }
    let shape = vec![EXPERTS, n, k];
    [
        Stored { name: name.into(), dtype: Dtype::F8_E4M3, shape: shape.clone(), data: codes },
        Stored::f32(&format!("{name}_scale_inv"), &[EXPERTS, rows, columns], &scales),
        Stored::f32(name, &shape, &numbers),
    ]
}

/// A layer with FP8 weights, and the same layer with the decoded values in f32.
fn folders() -> [Folder; 2] {
    let layer = "model.layers.1.mlp";
    let ramp = |len: usize| (0..len).map(|i| (i * 7 % 23) as f32 / 11.0 - 1.0).collect::<Vec<_>>();
    let gate =
        Stored::f32(&format!("{layer}.gate.weight"), &[EXPERTS, HIDDEN], &ramp(EXPERTS * HIDDEN));
    let gate_up = stack(&format!("{layer}.experts.gate_up_proj"), 2 * INTERMEDIATE, HIDDEN, 0.05);
    let down = stack(&format!("{layer}.experts.down_proj"), HIDDEN, INTERMEDIATE, 0.07);
    [0, 1].map(|plain| {
        let folder = Folder::of("mixtral-tiny");
        let sizes = [("hidden_size", 40, HIDDEN), ("intermediate_size", 20, INTERMEDIATE)];
        for (key, from, to) in [&sizes[..], &[("num_local_experts", 5, EXPERTS)]].concat() {
            folder.edit(
                "config.json",
                &format!("\"{key}\": {from},"),
                &format!("\"{key}\": {to},"),
            );
        }
        let mut tensors = vec![gate.clone()];
        for [codes, scales, numbers] in [&gate_up, &down] {
            match plain {
                1 => tensors.push(numbers.clone()),
                _ => tensors.extend([codes.clone(), scales.clone()]),
            }
        }
        if plain == 0 {
            let blocks =
                "\"quantization_config\": {\"weight_block_size\": [128, 128]}, \"vocab_size\"";
            folder.edit("config.json", "\"vocab_size\"", blocks);
        }
        write(&folder.path("model.safetensors"), &tensors);
        let x = Stored::f32("x", &[9, HIDDEN], &ramp(9 * HIDDEN));
        write(&folder.path("recorded.safetensors"), &[x]);
        folder
    })
}

#[test]
fn each_expert_uses_its_own_scales() {
    let y = folders().map(|folder| {
        let done = run(&folder, 1, &["--device", "cpu", "--dtype", "f32"]);
        assert_eq!(done.status, Some(0), "{done:?}");
        folder.tensors("y.safetensors").into_iter().find(|stored| stored.name == "y").unwrap()
    });
    assert!(y[0].values().iter().all(|y| y.is_finite()) && y[0].values().iter().any(|y| *y != 0.0));
    assert_eq!(y[0], y[1], "the same numbers in FP8 and in f32");
}

/// Scales of a single matrix, of fewer blocks, or transposed are errors.
#[test]
fn rejects_scales_of_wrong_shape() {
    let n = 2 * INTERMEDIATE;
    for shape in [vec![3, 2], vec![1, 3, 2], vec![3, 2, 2], vec![3, 2, 3], vec![3, n, HIDDEN]] {
        let [folder, _] = folders();
        let mut tensors = folder.tensors("model.safetensors");
        let scales = tensors
            .iter_mut()
            .find(|stored| stored.name.ends_with("gate_up_proj_scale_inv"))
            .unwrap();
        assert_eq!(scales.shape, [3, 3, 2]);
        *scales = Stored::f32(&scales.name, &shape, &vec![1.0; shape.iter().product()]);
        write(&folder.path("model.safetensors"), &tensors);
        let done = run(&folder, 1, &["--device", "cpu", "--dtype", "f32"]);
        assert_eq!(done.status, Some(2), "{shape:?}: {done:?}");
        let words = format!("gate_up_proj_scale_inv` is {shape:?}, wanted [3, 3, 2]");
        assert!(done.stderr.contains(&words), "{}", done.stderr);
    }
}

/// Square experts of `[in, out]`: the scale of an output feature applies to a column.
#[test]
fn output_feature_scales_of_transposed_experts_apply_to_columns() {
    const WIDTH: usize = 24; // H and 2I
    let inner = WIDTH / 2;
    let ramp = |len: usize| (0..len).map(|i| (i * 7 % 23) as f32 / 11.0 - 1.0).collect::<Vec<_>>();
    let layer = "language_model.model.layers.1.feed_forward";
    let f32 = |name: &str, shape: &[usize]| {
        Stored::f32(&format!("{layer}.{name}"), shape, &ramp(shape.iter().product()))
    };
    let plain = [
        f32("router.weight", &[EXPERTS, WIDTH]),
        f32("shared_expert.gate_proj.weight", &[inner, WIDTH]),
        f32("shared_expert.up_proj.weight", &[inner, WIDTH]),
        f32("shared_expert.down_proj.weight", &[WIDTH, inner]),
    ];
    let stacks = [("gate_up_proj", WIDTH, WIDTH), ("down_proj", inner, WIDTH)];
    let y = |quantised: Option<fn(usize) -> [usize; 3]>| {
        let folder = Folder::of("llama4-tiny");
        folder.edit(
            "config.json",
            "\"intermediate_size\": 14",
            &format!("\"intermediate_size\": {inner}"),
        );
        folder.edit(
            "config.json",
            "\"num_local_experts\": 5",
            &format!("\"num_local_experts\": {EXPERTS}"),
        );
        let mut tensors = plain.to_vec();
        for (name, inputs, outputs) in stacks {
            let name = format!("{layer}.experts.{name}");
            let shape = [EXPERTS, inputs, outputs];
            let codes: Vec<u8> =
                (0..EXPERTS * inputs * outputs).map(|i| (i * 29 % 67) as u8).collect();
            let scales: Vec<f32> = (0..EXPERTS * outputs).map(|i| 0.05 + 0.03 * i as f32).collect();
            let Some(of) = quantised else {
                let scale = |i: usize| scales[i / (inputs * outputs) * outputs + i % outputs];
                let numbers: Vec<f32> =
                    codes.iter().enumerate().map(|(i, code)| value(*code) * scale(i)).collect();
                tensors.push(Stored::f32(&name, &shape, &numbers));
                continue;
            };
            let scale_shape: Vec<usize> =
                of(outputs).into_iter().filter(|size| *size > 0).collect();
            tensors.push(Stored::f32(&format!("{name}_scale"), &scale_shape, &scales));
            tensors.push(Stored {
                name,
                dtype: Dtype::F8_E4M3,
                shape: shape.to_vec(),
                data: codes,
            });
        }
        write(&folder.path("model.safetensors"), &tensors);
        let x = Stored::f32("x", &[9, WIDTH], &ramp(9 * WIDTH));
        write(&folder.path("recorded.safetensors"), &[x]);
        let done = run(&folder, 1, &["--device", "cpu", "--dtype", "f32"]);
        assert_eq!(done.status, Some(0), "{done:?}");
        folder.tensors("y.safetensors").into_iter().find(|stored| stored.name == "y").unwrap()
    };
    let wanted = y(None);
    // A size of 0 is ignored.
    let shapes: [fn(usize) -> [usize; 3]; 3] = [
        |outputs| [EXPERTS, 1, outputs],
        |outputs| [EXPERTS, outputs, 1],
        |outputs| [EXPERTS, outputs, 0],
    ];
    for (number, shape) in shapes.into_iter().enumerate() {
        assert_eq!(y(Some(shape)), wanted, "shape {number}");
    }
}
