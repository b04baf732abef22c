//go:build race

package xds

const fanOut = 200 // streams; the race detector makes each some ten times dearer
