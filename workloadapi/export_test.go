package workloadapi

// Known is how many callers are remembered.
func (r *CallRate[K]) Known() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.known)
}
