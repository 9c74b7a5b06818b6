package pods

// All returns the pods of a cluster that are known, in no order. It is for who looks at all of them now and then.
func (x *Expander) All(cluster string) []*Pod {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []*Pod
	for k, s := range x.pods {
		if k.cluster == cluster {
			out = append(out, s.pod)
		}
	}
	return out
}
