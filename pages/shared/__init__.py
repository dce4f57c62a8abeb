"""Code that the pages share, in a subfolder so that Streamlit does not take it for a page."""
