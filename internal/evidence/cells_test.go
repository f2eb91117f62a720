package evidence

import (
	"slices"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// Every add is in the cell, the group and the layer it was made in, once, whoever adds at the same time.
func TestTable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		layers := rapid.IntRange(1, 17).Draw(t, "layers")
		width := rapid.IntRange(1, 40).Draw(t, "width")
		groups := rapid.SampledFrom([]int{1, 16, 64}).Draw(t, "groups")
		table := NewLayers(layers, width, groups)
		if table.Width() != width || table.Groups() != groups {
			t.Fatalf("%d cells in %d groups", table.Width(), table.Groups())
		}
		want := make([][]uint64, layers)
		for l := range want {
			want[l] = make([]uint64, width*groups)
		}
		var work sync.WaitGroup
		for range rapid.IntRange(0, 50).Draw(t, "adds") {
			layer, cell := rapid.IntRange(0, layers-1).Draw(t, "layer"), rapid.IntRange(0, width-1).Draw(t, "cell")
			shard, group := rapid.Uint64Range(0, Shards-1).Draw(t, "shard"), rapid.Uint64Range(0, 63).Draw(t, "group")
			want[layer][int(group)%groups*width+cell]++
			work.Go(func() {
				if layer == 0 {
					table.Add(shard, group, cell)
				} else {
					table.AddAt(shard, (layer*groups+int(group)%groups)*width+cell)
				}
			})
		}
		work.Wait()
		all, sums := make([]uint64, width*groups), make([]uint64, width)
		for l := range want {
			got := make([]uint64, width*groups)
			if table.AddLayerTo(got, l); !slices.Equal(got, want[l]) {
				t.Fatalf("layer %d is %v, not %v", l, got, want[l])
			}
			for k, n := range want[l] {
				all[k] += n
				sums[k%width] += n
			}
		}
		got, gotSums := make([]uint64, width*groups), make([]uint64, width)
		table.AddGroupsTo(got)
		table.AddTo(gotSums)
		if !slices.Equal(got, all) || !slices.Equal(gotSums, sums) {
			t.Fatalf("%v and %v, not %v and %v", got, gotSums, all, sums)
		}
	})
}
