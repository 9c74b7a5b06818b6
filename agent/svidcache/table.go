package svidcache

import "hash/maphash"

// tableShards is how many maps a table is split into: a change copies one of them, not all.
const tableShards = 256

// A table is an immutable map. An edit of it shares with it all shards that it does not touch, so that one change among
// ten thousand entries costs microseconds and readers never wait.
type table[K comparable, V any] struct {
	seed   maphash.Seed
	shards [tableShards]map[K]V
	n      int
}

func newTable[K comparable, V any]() *table[K, V] {
	return &table[K, V]{seed: maphash.MakeSeed()}
}

func (t *table[K, V]) shard(k K) int { return int(maphash.Comparable(t.seed, k) % tableShards) }

func (t *table[K, V]) get(k K) (V, bool) {
	v, ok := t.shards[t.shard(k)][k]
	return v, ok
}

func (t *table[K, V]) len() int { return t.n }

// all calls f for every pair until f returns false.
func (t *table[K, V]) all(f func(K, V) bool) {
	for _, m := range t.shards {
		for k, v := range m {
			if !f(k, v) {
				return
			}
		}
	}
}

// A tableEdit is a table under construction. Its owner is one goroutine.
type tableEdit[K comparable, V any] struct {
	next  table[K, V]
	owned [tableShards]bool
}

func (t *table[K, V]) edit() *tableEdit[K, V] {
	return &tableEdit[K, V]{next: *t}
}

func (e *tableEdit[K, V]) own(i int) map[K]V {
	if !e.owned[i] {
		m := make(map[K]V, len(e.next.shards[i])+1)
		for k, v := range e.next.shards[i] {
			m[k] = v
		}
		e.next.shards[i], e.owned[i] = m, true
	}
	return e.next.shards[i]
}

func (e *tableEdit[K, V]) get(k K) (V, bool) { return e.next.get(k) }

func (e *tableEdit[K, V]) set(k K, v V) {
	m := e.own(e.next.shard(k))
	if _, ok := m[k]; !ok {
		e.next.n++
	}
	m[k] = v
}

func (e *tableEdit[K, V]) remove(k K) {
	i := e.next.shard(k)
	if _, ok := e.next.shards[i][k]; ok {
		delete(e.own(i), k)
		e.next.n--
	}
}

// done returns the finished table; the edit must not be used any more.
func (e *tableEdit[K, V]) done() *table[K, V] { return &e.next }
