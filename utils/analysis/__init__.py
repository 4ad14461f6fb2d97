"""The paper's analysis of the `[SEG]` token: where it looks, what its points are worth, and what each prompt adds.

    python -m utils.analysis --version assets/read-mini-base --data "ReasonSeg|val" --dataset_dir data/mini --out runs/analysis

In: checkpoints and data sets. Out: a folder with a page, tables and pictures that can be moved as it is (`__main__`). The model's
forward knows nothing of this: what lies inside is read off by hooks on the unmodified modules (`probe`).

Three similarity maps, each the plain dot product that SasP uses (protocol §4-1), of `[SEG]` with the picture:

    clip     last hidden state of [SEG] · projected CLIP features, before the language model
    llava    the same state · last hidden states of the image tokens: the map of which SasP makes points
    sam      what SAM's decoder makes of the projected [SEG] · its image embedding, both after the two-way transformer, when
             the model draws its own mask. (The released code drew the token before it: with points SAM's padding point,
             without them a mask token. `--sam_token released` does so too.)

Four masks, of the same SAM image embedding or, for `untouched`, of that SAM's own:

    points      SAM prompted with the points alone, without [SEG]; the checkpoint's decoder, its first mask as everywhere
    untouched   the same points in the SAM of `--sam`, the best of its three masks by its own estimate (as the released code)
    embedding   SAM prompted with the projected [SEG] alone: SESAME's path, SasP off
    both        [SEG] and points: READ

The model's own mask is `both`, or `embedding` where SasP is off. Without a `[SEG]` (answers generated) all masks are empty.

Numbers, all as shares of 1, pixels marked as ignored left out of all of them:

    map in the picture   the grid is min-max normalised over the cells that show the picture (`clip`, `llava`: all tokens, that
                         is CLIP's view, its centre square; `sam`: the part of SAM's square that is picture), then
                         interpolated bilinearly to the pixels of the picture. Outside CLIP's view it is 0. A map without
                         contrast, or with a value that is not finite, is 0 everywhere
    S_IoU at t           I / (U + 1e-5) of {map >= t} and the true mask, over the whole picture
    S_IoU                the mean of that over the expressions whose object has pixels, at t = .5: the number to quote.
                         `thresholds.csv` has t = .05, .10, ..., .95, with the cumulative value (sum of I / sum of U) as well; the
                         best t is found on the same expressions, so it flatters
    peak                 share of these expressions in which the map's greatest pixel lies on the object: needs no threshold
    agreement            of two maps: mean of Pearson's r over the pixels that both cover, and mean IoU of both at t = .5
    gIoU, cIoU           of the masks, as `utils.metrics` defines them
    link                 Pearson's r, over the expressions, of a map's S_IoU with the IoU of the model's own mask

Layers (`--layers`): the map of layer k is that of image tokens and [SEG] in transformers' `hidden_states[k]`: 0 what goes into
the language model, the last what comes out of its final norm. `last` takes [SEG] from the last layer instead, so that its
layer 0 is `clip`; in both ways the last layer is `llava`.

Sweeps (`--sweep`): SasP's values one at a time, all others as the checkpoint has them; SAM's decoder is prompted anew, nothing
else runs again. Differences from the checkpoint's own values carry the 95 % interval of a paired bootstrap over pictures.

Legend of the tensors: N questions · M [SEG] tokens · T tokens · P image tokens, a grid of g x g · D hidden width · C SAM width ·
K points · (H, W) pixels of the original picture. One picture at a time.
"""
