"""Dashboard: Streamlit pages over pure figure functions; reads the run store, imports neither Ray nor torch."""
