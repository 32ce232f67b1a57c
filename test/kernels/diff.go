// This file shows how two reports differ.

package main

import "strings"

// diffLines returns the lines that differ between two texts, "-" before those
// of have and "+" before those of want, found by the longest common
// subsequence. It suits texts of some hundred lines.
func diffLines(have, want string) string {
	a := strings.Split(strings.TrimSuffix(have, "\n"), "\n")
	b := strings.Split(strings.TrimSuffix(want, "\n"), "\n")
	// common[i][j] is the length of the subsequence of a[i:] and b[j:].
	common := make([][]int, len(a)+1)
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var out strings.Builder
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			i, j = i+1, j+1
		case j == len(b) || i < len(a) && common[i+1][j] >= common[i][j+1]:
			out.WriteString("-" + a[i] + "\n")
			i++
		default:
			out.WriteString("+" + b[j] + "\n")
			j++
		}
	}
	return out.String()
}
